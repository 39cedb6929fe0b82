"""Moments of states: what numpy says of all rows at once, however they come, and from the file as from the rows."""

import threading

import numpy as np
import pytest
import torch
from test_thought_store import make_identity, make_rows, write

from softcot_ds.errors import SoftCoTError
from softcot_ds.thoughts import moments as tm
from softcot_ds.thoughts.moments import Moments, RunningMoments, moments_of
from softcot_ds.thoughts.store import ThoughtStore


def massive(count: int, num_thoughts: int = 3, width: int = 5) -> torch.Tensor:
    """(count, T, P) float32 states as models have them: one coordinate is thousands of deviations from zero."""
    rows = torch.randn(count, num_thoughts, width, generator=torch.Generator().manual_seed(1))
    rows = rows @ torch.randn(width, width, generator=torch.Generator().manual_seed(2))
    return rows + torch.tensor([0.0, 4000.0, 0.5, -30.0, 0.0]) + torch.arange(float(num_thoughts))[:, None]


def check(found: Moments, rows: torch.Tensor) -> None:
    """Against numpy's, in float64, of all rows at once."""
    whole = rows.double().numpy()
    np.testing.assert_allclose(found.mean_TP, whole.mean(axis=0), rtol=1e-14)
    flat = whole.reshape(-1, whole.shape[-1])
    np.testing.assert_allclose(found.mean_P, flat.mean(axis=0), rtol=1e-14)
    directions, variances = found.directions_PP.numpy(), found.variances_P.numpy()
    assert (np.diff(variances) <= 0).all()
    covariance = np.cov(flat, rowvar=False, bias=True)
    np.testing.assert_allclose(directions * variances @ directions.T, covariance, rtol=0, atol=1e-11 * covariance.max())
    np.testing.assert_allclose(directions.T @ directions, np.eye(len(variances)), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portions", [[40], [1, 1, 30, 8]])
def test_moments_are_those_of_all_rows_however_they_come(portions, dtype):
    rows = massive(40).to(dtype)
    running = RunningMoments(3, 5)
    for some in rows.split(portions):
        running.add(some)
    check(running.moments(), rows)


@pytest.mark.parametrize("count", [40, 1])
def test_what_is_taken_for_a_questions_own_part_is_nearest_to_it(count):
    """By numpy's least squares over all states; of one question, whose states do not vary, there is none."""
    rows = massive(count) + 20 * torch.eye(3, 5)
    running = RunningMoments(3, 5)
    running.add(rows)
    rows = rows.double().numpy()
    centred, own = ((rows - rows.mean(axis=axes)).reshape(-1, 5) for axes in ((0, 1), 0))
    wanted = np.linalg.lstsq(centred, own, rcond=1e-9)[0]
    np.testing.assert_allclose(centred @ running.moments().own_PP.numpy().T, centred @ wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("portions", [[13, 27], [40, 0]])
def test_ranks_have_the_moments_of_all_their_rows(monkeypatch, portions):
    """Threads in the place of ranks; one may have no row at all."""
    meet, given = threading.Barrier(2), {}

    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        given[threading.get_ident()] = values
        meet.wait()
        total = sum(given.values())
        meet.wait()
        return total

    def on_rank(some: torch.Tensor, found: list[Moments]) -> None:
        running = RunningMoments(3, 5)
        for row in some.split(4) if len(some) else ():
            running.add(row)
        found.append(running.over_ranks().moments())

    monkeypatch.setattr(tm, "sum_over_ranks", sum_over_ranks)
    rows, found = massive(40), []
    threads = [threading.Thread(target=on_rank, args=(some, found)) for some in rows.split(portions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 2
    for moments in found:
        check(moments, rows)


def test_states_that_are_not_finite_are_refused():
    running = RunningMoments(1, 2)
    running.add(torch.tensor([[[1.0, float("inf")]]]))
    with pytest.raises(SoftCoTError, match="not finite; see softcot-ds doctor"):
        running.moments()


@pytest.fixture
def cache(tmp_path) -> tuple[ThoughtStore, list[bytes], torch.Tensor]:
    identity = make_identity(dtype="bfloat16")
    keys, rows = make_rows(identity, 30)
    write(tmp_path, identity, keys, rows)
    return ThoughtStore.open(tmp_path), keys, rows


def test_moments_are_computed_once_for_the_same_rows_and_anew_for_others(cache, monkeypatch):
    store, keys, rows = cache
    monkeypatch.setattr(tm, "_CHUNK_BYTES", 7 * store.identity.row_bytes)
    check(moments_of(store, keys[:20]), rows[:20])
    (path,) = store.folder.glob("moments-*")
    before = path.read_bytes()

    check(moments_of(store, [*keys[:20], keys[0]]), torch.cat([rows[:20], rows[:1]]))
    assert len(list(store.folder.glob("moments-*"))) == 2
    monkeypatch.setattr(ThoughtStore, "read", None)
    check(moments_of(store, keys[19::-1]), rows[:20])
    assert path.read_bytes() == before


def test_a_row_that_one_rank_lacks_is_told_by_all_before_they_meet(cache, monkeypatch):
    store, keys, _ = cache
    monkeypatch.setattr(tm, "agreed", lambda reason: reason or "rank 1 lacks a row")
    monkeypatch.setattr(tm, "sum_over_ranks", None)
    with pytest.raises(SoftCoTError, match="rank 1 lacks a row"):
        moments_of(store, keys)
    with pytest.raises(SoftCoTError, match="1 of 31 rows are not in the cache"):
        moments_of(store, [*keys, b"?" * 32])


def test_moments_that_cannot_be_kept_are_those_all_the_same(cache, monkeypatch, capsys):
    store, keys, rows = cache
    monkeypatch.setattr(
        tm, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    check(moments_of(store, keys), rows)
    assert "No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize("harm", [lambda whole: whole[:-9], lambda whole: whole[:-9] + b"damaged!!", lambda whole: b""])
def test_a_damaged_file_is_computed_anew(cache, capsys, harm):
    store, keys, rows = cache
    check(moments_of(store, keys), rows)
    (path,) = store.folder.glob("moments-*")
    path.write_bytes(harm(path.read_bytes()))
    check(moments_of(store, keys), rows)
    assert f"{path} " in capsys.readouterr().out
    check(moments_of(store, keys), rows)
    assert not capsys.readouterr().out
