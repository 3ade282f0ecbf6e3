import numpy as np
import polars as pl

from gemst.data.hashing import mix, stable_hash


def test_values_never_change():
    # Written down: a change here moves every task assignment, query and held-out event of every user of the library.
    hashes = stable_hash(pl.Series(["", "a", "ab", "é", None], dtype=pl.String))
    assert hashes.tolist() == [
        16294208416658607535, 17360999193197444373, 17154135737692234531, 4360416512126684521, 7960286522194355700,
    ]  # fmt: skip


def test_equal_strings_hash_equal_in_any_company():
    words = pl.Series([f"w{i % 1000}" for i in range(5000)])
    alone = {word: int(stable_hash(pl.Series([word]))[0]) for word in ("w0", "w999")}
    hashes = stable_hash(words)
    assert all(hashes[i] == alone[word] for word in alone for i in np.flatnonzero((words == word).to_numpy()))
    assert (stable_hash(words.unique().sort()) == stable_hash(words.unique().sort(descending=True))[::-1]).all()


def test_spreads_and_does_not_collide():
    hashes = stable_hash(pl.Series([str(i) for i in range(100_000)]))
    assert len(np.unique(hashes)) == 100_000
    counts = np.bincount((hashes % np.uint64(10)).astype(np.int64))
    assert counts.min() > 9_700
    assert counts.max() < 10_300


def test_salt_and_order_matter():
    a, b = stable_hash(pl.Series(["x", "y"])), stable_hash(pl.Series(["y", "x"]))
    assert (stable_hash(pl.Series(["x"]), salt=1) != a[0]).all()
    assert (mix(a, b) != mix(b, a)).all()


def test_nothing_to_hash():
    assert stable_hash(pl.Series([], dtype=pl.String)).shape == (0,)
    assert len(np.unique(stable_hash(pl.Series([None, None], dtype=pl.String)))) == 1
