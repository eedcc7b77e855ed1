"""The recipe benchmark: its arithmetic, and that a piece of it is never lost nor mixed with another commit's."""

import json
import math

import pytest

from benchmarks import recipe
from utils.errors import UserError


def run(tokens, loss):
    return {"tokens": tokens, "seconds": 2 * tokens, "loss": loss}


def test_the_sweep_goes_on_until_the_best_rate_lies_inside():
    def around(best):
        return recipe.best_rate([0.001, 0.002, 0.004], lambda rate: abs(math.log(rate / best)))

    assert around(0.002)[0] == 0.002 and len(around(0.002)[1]) == 3
    assert around(0.0005)[0] == 0.0005 and sorted(around(0.0005)[1]) == [0.00025, 0.0005, 0.001, 0.002, 0.004]
    assert around(0.008)[0] == 0.008 and max(around(0.008)[1]) == 0.016


@pytest.mark.parametrize("enough, shares", [(0.45, (0.5, 0.385)), (0.3, (0.5, 0.385, 0.296)), (0.6, (0.649, 0.5))])
def test_the_share_is_bracketed_and_interpolated(enough, shares):
    ours = recipe.bracket(lambda share: run(1000 * share, 5 - math.log(share)), 5 - math.log(enough))
    assert [r["tokens"] / 1000 for r in ours] == pytest.approx(shares, abs=1e-3)
    assert recipe.needed(ours, 5 - math.log(enough), "tokens") == pytest.approx(1000 * enough)  # a straight line in log
    assert recipe.needed(ours, 5 - math.log(enough), "seconds") == pytest.approx(2000 * enough)


def test_a_loss_that_is_never_reached_needs_infinitely_many_tokens():
    assert recipe.needed(recipe.bracket(lambda share: run(share, 6.0), 5.0), 5.0, "tokens") == math.inf


def test_finished_runs_are_reused(tmp_path, monkeypatch, capsys):
    trained = []

    def train(self, model, seed, tokens, flags):
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append((model, seed, tokens, flags))
        slow = sum(abs(math.log(float(flag[9:]) / 0.002)) for flag in flags if flag.startswith("--max_lr"))
        return {**run(tokens, 6 + slow - math.log(tokens * (1 if flags else 2.2))), "curve": [[tokens, 6.0]]}

    monkeypatch.setattr(recipe.Runs, "_train", train)
    flags = [f"--results={tmp_path / 'r.json'}", f"--picture={tmp_path / 'r.png'}", "--models=a", "--seeds=1,2"]
    monkeypatch.setattr("sys.argv", ["recipe.py", *flags])
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 5
    stop_at = None
    recipe.main()
    assert len(trained) == len(set(trained)) + 1  # the best rate of the sweep once more, next to ours
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["results"]["a"]["mean"]["tokens"] == pytest.approx(1 / 2.2, rel=1e-3)
    assert "yes (the largest mean is 45%)" in capsys.readouterr().out and (tmp_path / "r.png").stat().st_size
    count = len(trained)
    recipe.main()
    assert len(trained) == count

    kept["about"]["commit"] = "another"
    (tmp_path / "r.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="runs of another commit"):
        recipe.main()
