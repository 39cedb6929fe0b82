"""A point of a curve, as TensorBoard reads it; its usual writers have no room for what the curve is."""

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata


def point(tag: str, value: float, words: str = "") -> Summary.Value:
    """``words``: what the curve shows; those of its first point count."""
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    metadata = SummaryMetadata(plugin_data=plugin, summary_description=words, data_class=DATA_CLASS_SCALAR)
    return Summary.Value(tag=tag, simple_value=value, metadata=metadata)
