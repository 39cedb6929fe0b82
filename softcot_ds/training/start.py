"""What a training starts from: weights, and the conditioning of states that they are trained with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from softcot_ds.data.examples import Example
from softcot_ds.distributed import device, from_all_ranks
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import Method, method_class
from softcot_ds.methods.conditioning import Conditioning, Weights, needs_moments, token_sized
from softcot_ds.methods.initial import projection_weights
from softcot_ds.methods.projection import check_fits
from softcot_ds.models.backbone import vocabulary
from softcot_ds.models.embedding import token_rms
from softcot_ds.models.partition import set_whole
from softcot_ds.thoughts.moments import Moments
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training.checkpoint import read_training_state


@dataclass(frozen=True)
class Start:
    """The weights are as they are trained: of conditioned states."""

    weights: Weights | None = None
    """None: from the seed."""
    conditioning: Conditioning | None = None
    sized_by: Moments | None = None
    """Of the states by which weights from the seed are scaled (``projection.init_scale=auto``)."""

    @classmethod
    def anew(cls, experiment: Experiment, reader: ThoughtReader, examples: list[Example]) -> "Start":
        """Of a run that begins; all ranks call it.

        Args:
            examples: of the training.

        Raises:
            SoftCoTError: a row of the cache or ``projection.init_from`` is damaged, or the latter does not fit;
                or the states do not vary.
        """
        recipe = experiment.recipe
        settings, kind = recipe.projection, method_class(recipe.method).projection_class
        if kind is None:
            return cls()
        moments = reader.moments(examples) if needs_moments(recipe, kind) else None
        if moments is not None and not moments.varies:
            raise SoftCoTError(
                f"the assistant's states of all {len(examples):,} training problems are the same: nothing of them can "
                "be brought to a size. Try another thoughts.placeholder or thoughts.layer; or set projection.condition="
                "none and projection.init_scale to a number"
            )
        conditioning = None
        if settings.condition != "none":
            conditioning = _conditioning(moments, whiten=settings.condition == "whiten").to(device())
        if settings.init_from is None:
            return cls(None, conditioning, moments if settings.init_scale == "auto" else None)
        weights = projection_weights(settings.init_from, recipe)
        with torch.device("meta"):
            wanted = kind.empty(recipe, *experiment.widths)
        check_fits(weights, wanted, settings.init_from)
        return cls(conditioning.unfold(weights, kind.entry) if conditioning else weights, conditioning)

    @classmethod
    def again(cls, folder: Path) -> "Start":
        """Of a run that goes on from a checkpoint. Raises SoftCoTError when that is damaged."""
        state = read_training_state(folder)
        return cls(state.weights, state.conditioning.to(device()) if state.conditioning else None)

    def put_into(self, model: Method) -> None:
        """Set the weights of a new method, in float32; all ranks call it."""
        weights = self.weights
        if self.sized_by is not None:
            rms = from_all_ranks(token_rms(model.base.get_input_embeddings(), vocabulary(model.base.config)))[0]
            weights = self._sized(model, rms)
        if weights is not None:
            for name, parameter in model.trained().items():
                set_whole(parameter, weights[name])

    def _sized(self, model: Method, rms: float) -> Weights:
        moments, centred = self.sized_by, _conditioning(self.sized_by, whiten=False)
        conditioning = self.conditioning.to("cpu") if self.conditioning else centred
        parts = moments.own_PP, moments.within_PP, moments.between_TP, moments.mean_P
        drawn = {name: parameter.detach() for name, parameter in model.trained().items()}
        sized = token_sized(drawn, model.projection_class.entry, conditioning, *parts, rms)
        return sized if self.conditioning else centred.fold(sized, model.projection_class.entry)


def _conditioning(moments: Moments, whiten: bool) -> Conditioning:
    return Conditioning.of(moments.mean_P, moments.variances_P, moments.directions_PP, whiten)
