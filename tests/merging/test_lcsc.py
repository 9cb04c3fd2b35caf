"""Exact properties of LCSC: the search, the candidates in memory, the state, the merge."""

from __future__ import annotations

import contextlib
import importlib.machinery
import itertools
import json
import math
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from hf_ext.merging import Lcsc, LcscResult, lcsc_search, merge
from hf_ext.merging._candidates import Candidates, EvaluationLoss, evaluation_losses
from hf_ext.merging._evolution import Evolution, Member, starts
from tests.conftest import ModelFactory
from tests.merging.models import random_models, save_model, tensors_of
from tests.merging.runs import Scalar, distance, scalar_run
from tests.reference import lcsc as reference

pytestmark = pytest.mark.filterwarnings("ignore:no holdout_metric")
RATES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def evolution(**changes: Any) -> Evolution:
    settings: dict[str, Any] = {
        "population": 20,
        "parents": 6,
        "iterations": 60,
        "sigma": 0.1,
        "ema_rates": RATES,
        "max_l2": 5.0,
        "generation": 1,
        "seed": 0,
    }
    return Evolution(**{**settings, **changes})


def each(score: Callable[[Sequence[float]], float]) -> Callable[[Sequence[Sequence[float]]], Iterator[float]]:
    return lambda candidates: (score(candidate) for candidate in candidates)


def bowl(coefficients: Sequence[float]) -> float:
    """Return a function of four coefficients whose least value is at (-0.4, 0.2, 0.3, 0.9)."""
    return sum((a - b) ** 2 for a, b in zip(coefficients, (-0.4, 0.2, 0.3, 0.9), strict=True))


# The search ---------------------------------------------------------------------------------------


def test_every_candidate_has_sum_one() -> None:
    seen: list[Sequence[float]] = []
    members, start, _ = evolution(sigma=1.0).run(4, each(lambda c: seen.append(c) or bowl(c)))
    assert len(seen) == len(start) + 60
    for coefficients in [*seen, *(member.coefficients for member in members)]:
        assert abs(math.fsum(coefficients) - 1.0) < 1e-9
    free = [math.hypot(*c[1:]) for c in seen]
    assert max(free) <= 5.0 + 1e-9


def test_the_best_score_never_rises_and_is_no_worse_than_the_start() -> None:
    members, start, best = evolution().run(4, each(bowl))
    assert all(later <= earlier for earlier, later in itertools.pairwise(best))
    assert members[0].score == best[-1] <= min(member.score for member in start.values())
    assert members == sorted(members, key=lambda member: member.score)
    assert len(members) == 20


def test_the_start_is_the_last_the_uniform_and_exponential_averages() -> None:
    found = starts(3, (0.0, 0.5, 1.0))
    assert list(found) == ["last", "uniform", "ema 0.5"]
    assert found["last"] == (0.0, 0.0, 1.0)
    assert found["ema 0.5"] == pytest.approx((1 / 7, 2 / 7, 4 / 7))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_the_plain_one(seed: int) -> None:
    members, _, best = evolution(seed=seed, population=5, parents=3).run(4, each(bowl))
    found, trace = reference.search(
        bowl, 4, population=5, parents=3, iterations=60, sigma=0.1, rates=RATES, max_l2=5.0, seed=seed
    )
    assert members[0].coefficients == pytest.approx(found, abs=1e-12)
    assert best == pytest.approx(trace, abs=1e-12)


def test_children_of_a_generation_do_not_see_one_another() -> None:
    asked: list[int] = []

    def scores(candidates: Sequence[Sequence[float]]) -> Iterator[float]:
        asked.append(len(candidates))
        return (bowl(candidate) for candidate in candidates)

    evolution(generation=8, iterations=20).run(4, scores)
    assert asked[1:] == [8, 8, 4]


def test_equal_candidates_are_evaluated_once() -> None:
    seen: list[Sequence[float]] = []
    same = [Member((0.5, 0.5), 1.0), Member((0.5, 0.5), 1.0)]
    settings = evolution(sigma=1e-12, ema_rates=(), parents=2)
    settings.run(2, each(lambda c: seen.append(c) or abs(c[0] - 0.5)))
    assert len(seen) == len({tuple(round(x, 6) for x in c) for c in seen})
    assert settings.child(same, 0) == pytest.approx((0.5, 0.5), abs=1e-9)


# On checkpoints -----------------------------------------------------------------------------------


def search(folders: list[Path], target: float, **options: Any) -> Any:
    return lcsc_search(folders, distance(target), model=Scalar(), progress=False, **options)


def test_a_value_between_the_checkpoints_is_found(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    found = search(folders, 3.0, iterations=300)
    assert found.score < 1e-3
    assert found.start_scores == {
        "last": 1.0,
        "uniform": pytest.approx((5 / 3 - 3) ** 2),
        **{f"ema {rate:g}": found.start_scores[f"ema {rate:g}"] for rate in RATES[1:-1]},
    }


def test_a_value_beyond_the_checkpoints_is_found_by_a_negative_coefficient(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    found = search(folders, 1.5)
    assert found.coefficients == pytest.approx((-0.5, 1.5), abs=0.02)
    assert found.score < 1e-3 < 0.25 == min(found.start_scores.values())


def test_no_iterations_give_the_best_start(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    assert search(folders, 5.0, iterations=0).coefficients == (0.0, 0.0, 1.0)
    assert search(folders, 1.6, iterations=0).coefficients == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_greater_metric_that_is_better_is_sought(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    found = lcsc_search(
        folders, lambda model: -distance(1.5)(model), model=Scalar(), greater_is_better=True, progress=False
    )
    assert -1e-3 < found.score <= 0.0
    assert max(found.start_scores.values()) == -0.25
    assert found.score == pytest.approx(search(folders, 1.5).score * -1)


def test_a_run_gives_its_later_half(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", *map(float, range(5)))
    options: dict[str, Any] = {"model": Scalar(), "progress": False, "iterations": 0}
    assert lcsc_search(tmp_path / "run", distance(9.0), **options).checkpoints == tuple(folders[2:])
    whole = lcsc_search(tmp_path / "run", distance(9.0), window=1.0, **options)
    assert whole.checkpoints == tuple(folders)


def test_candidates_have_the_bits_that_the_linear_merge_writes(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        models = random_models(tmp_path / str(dtype), 4, dtype=dtype)
        coefficients = [-0.3, 0.45, 0.0, 0.85]
        named = [
            {"model": str(m), "parameters": {"weight": c}} for m, c in zip(models, coefficients, strict=True)
        ]
        out = tmp_path / f"{dtype}-out"
        merge({"merge_method": "linear", "models": named}, out, progress=False)
        written = tensors_of(out)
        for in_memory in (True, False):
            module = holder(models[0])
            candidates = Candidates(models, module, in_memory=in_memory)
            candidates.load(coefficients)
            state = module.state_dict()
            assert all(torch.equal(state[name], value) for name, value in written.items())
            candidates.close()
        plain = reference.combination([tensors_of(m)["lm_head.weight"] for m in models], coefficients)
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-6  # one rounding
        torch.testing.assert_close(written["lm_head.weight"].double(), plain, rtol=tolerance, atol=tolerance)


def holder(folder: Path) -> nn.Module:
    """Return a module whose state has the tensors of a checkpoint, under their names."""
    module = nn.Module()
    for name, value in tensors_of(folder).items():
        place = module
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(torch.zeros_like(value)))
    return module


# Choice at the end --------------------------------------------------------------------------------


def test_the_held_out_metric_decides_between_the_best(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    # What the search is led to is what the held-out metric finds worst: the last checkpoint wins instead.
    found = search(folders, 6.0, holdout_evaluate=distance(4.0))
    assert found.coefficients == (0.0, 0.0, 1.0)
    assert found.holdout_score == 0.0
    assert found.score == 4.0
    assert found.best[-1] < 0.1


def test_data_are_split_between_search_and_choice(tmp_path: Path) -> None:
    rows = [{"input_ids": [number, 1, 2]} for number in range(10)]
    with pytest.warns(UserWarning, match="data: 10 tokens are few"):
        search, rest = evaluation_losses(rows, tmp_path, 0.5)
    assert rest is not None
    first = {row["input_ids"][0] for row in search.rows}
    second = {row["input_ids"][0] for row in rest.rows}
    assert not first & second
    assert first | second == set(range(10))
    assert len(second) == 5
    assert first != set(range(5)), "spread over the rows"


def test_the_loss_is_the_models_own_over_all_tokens(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    rows = tuple({"input_ids": [(3 * i + j) % 256 for j in range(2 + i)]} for i in range(5))
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row["input_ids"]) - 1)
    for batch_size in (1, 2, 16):
        loss = EvaluationLoss(rows, batch_size)
        assert loss.tokens == 15
        with torch.no_grad():
            assert loss(model) == pytest.approx(total / 15, rel=1e-5)


def test_a_metric_that_is_not_the_same_twice_is_reported(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    calls: list[int] = []
    with pytest.warns(UserWarning, match="the metric is not the same for the same weights"):
        lcsc_search(
            folders,
            lambda model: float(calls.append(1) or len(calls)),
            model=Scalar(),
            iterations=0,
            progress=False,
        )


def test_scores_that_are_not_finite_are_discarded(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    found = lcsc_search(
        folders,
        lambda model: math.nan if float(model.w) > 1.2 else distance(1.5)(model),
        model=Scalar(),
        progress=False,
    )
    assert 0.09 <= found.score < 0.11
    with pytest.raises(ValueError, match="not finite for any combination"):
        lcsc_search(folders, lambda model: math.inf, model=Scalar(), progress=False, iterations=3)


# State --------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    options: dict[str, Any] = {"model": Scalar(), "progress": False, "iterations": 40, "generation": 3}
    whole = lcsc_search(folders, breaking(10**9), **options)
    again = lcsc_search(folders, breaking(10**9), **options)
    assert again == whole
    state = tmp_path / "state.json"
    for allowed in (1, 6, 9, 25):
        with pytest.raises(KeyboardInterrupt):
            lcsc_search(folders, breaking(allowed), state=state, **options)
        done = json.loads(state.read_text())["evaluations"] if state.exists() else []
        assert len(done) >= max(0, allowed - 2)  # two more ask whether the metric is the same twice
    counted: list[int] = []
    found = lcsc_search(folders, breaking(10**9, counted), state=state, **options)
    assert found == whole
    evaluations = json.loads(state.read_text())["evaluations"]
    assert len(counted) < len(evaluations) == len(whole.best)
    assert lcsc_search(folders, breaking(1), state=state, **options) == whole
    other = lcsc_search(folders, breaking(10**9), seed=1, **options)
    assert other.coefficients != whole.coefficients


def breaking(allowed: int, counted: list[int] | None = None) -> Callable[[Any], float]:
    """Return a metric that is interrupted after a number of evaluations."""
    calls = [] if counted is None else counted

    def evaluate(model: Any) -> float:
        calls.append(1)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return distance(3.0)(model)

    return evaluate


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    state = tmp_path / "state.json"
    search(folders, 3.0, iterations=2, state=state)
    rule = r"state must be that of the same checkpoints, metric, settings and seed; .*state\.json"
    for changes in ({"sigma": 0.2}, {"seed": 1}):
        with pytest.raises(ValueError, match=rule):
            search(folders, 3.0, **{"iterations": 2, "state": state, **changes})
    save_model(folders[0], {"w": torch.tensor([0.5])})
    with pytest.raises(ValueError, match=rule):
        search(folders, 3.0, iterations=2, state=state)
    state.write_text('{"evaluations": 3}')
    with pytest.raises(ValueError, match="state must be a file that this search has written"):
        search(folders, 3.0, iterations=2, state=state)


def test_nothing_but_the_state_is_written(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    before = sorted(tmp_path.rglob("*"))
    search(folders, 3.0, iterations=5)
    assert sorted(tmp_path.rglob("*")) == before


# Ray ----------------------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    with pytest.raises(ImportError, match=r"ray is not installed; .*hf-ext\[tune\]"):
        search(folders, 1.5, workers=2)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the calls that are made of Ray in its place, and return what is called; Ray is no test package."""
    module: Any = types.ModuleType("ray")
    module.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    events: list[str] = []

    class TaskError(Exception):
        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    class ActorError(Exception):
        pass

    def future(call: Callable[..., Any]) -> Any:
        def remote(*arguments: Any) -> Callable[[], Any]:
            def get() -> Any:
                try:
                    return call(*arguments)
                except ConnectionError as error:
                    raise ActorError("the process has ended") from error
                except Exception as error:
                    raise TaskError(error) from error

            return get

        return types.SimpleNamespace(remote=remote)

    class Remote:
        def __init__(self, cls: type) -> None:
            self.cls = cls

        def options(self, **options: Any) -> Remote:
            events.append(f"{options}")
            return self

        def remote(self, *arguments: Any) -> Any:
            events.append("actor")
            return types.SimpleNamespace(score=future(self.cls(*arguments).score))

    module.is_initialized = lambda: False
    module.init = lambda: events.append("init")
    module.put = lambda value: lambda: value
    module.remote = Remote
    module.get = lambda reference: reference()
    module.kill = lambda actor: events.append("kill")
    module.shutdown = lambda: events.append("shutdown")
    module.exceptions = types.SimpleNamespace(RayTaskError=TaskError, RayActorError=ActorError)
    monkeypatch.setitem(sys.modules, "ray", module)
    return events


def test_actors_give_the_result_of_one_process(tmp_path: Path, stand_in: list[str]) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    state = tmp_path / "state.json"
    alone = search(folders, 3.0, iterations=20, generation=4, state=state)
    assert search(folders, 3.0, iterations=20, generation=4, workers=2) == alone
    again = "{'max_restarts': 3, 'max_task_retries': 3}"
    assert stand_in == ["init", again, "actor", "actor", "kill", "kill", "shutdown"]
    # The number of workers is not part of a search: its state is gone on with.
    assert search(folders, 3.0, iterations=20, generation=4, workers=3, state=state) == alone
    with pytest.warns(UserWarning, match="workers: 1 of 2 have something to do at a time; raise generation"):
        search(folders, 3.0, iterations=1, workers=2)


@pytest.mark.parametrize(
    ("raised", "wanted", "match"),
    [
        (KeyError("the metric"), KeyError, "the metric"),
        (
            ConnectionError(),
            RuntimeError,
            "a Ray worker could not be started, or has died more than 3 times: the",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["metric", "process", "user"],
)
def test_what_goes_wrong_in_an_actor_is_told_and_nothing_is_left(
    raised: BaseException, wanted: type[BaseException], match: str | None, tmp_path: Path, stand_in: list[str]
) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    calls: list[int] = []

    def evaluate(model: Any) -> float:
        calls.append(1)
        if len(calls) == 6:  # the first two look whether the metric is the same twice
            raise raised
        return distance(3.0)(model)

    def run() -> LcscResult:
        keys: dict[str, Any] = {"iterations": 20, "generation": 4, "progress": False}
        return lcsc_search(folders, evaluate, model=Scalar(), workers=2, state=tmp_path / "s.json", **keys)

    with pytest.raises(wanted, match=match):
        run()
    assert stand_in[-3:] == ["kill", "kill", "shutdown"]
    assert len(json.loads((tmp_path / "s.json").read_text())["evaluations"]) == 3
    assert run() == search(folders, 3.0, iterations=20, generation=4)


def dies_once(model: Any) -> float:
    """Return the distance to 3, but end the first process other than the test's that asks."""
    place, own = os.environ["HF_EXT_TEST_RAY"].split(";")
    if str(os.getpid()) != own:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(place, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
    return distance(3.0)(model)


def test_ray_itself_starts_a_worker_again_that_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "ray", reason="Ray is an extra of its own; tried by hand with the release the page names"
    )
    monkeypatch.setenv("HF_EXT_TEST_RAY", f"{tmp_path / 'died'};{os.getpid()}")
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    settings: dict[str, Any] = {"iterations": 12, "generation": 4, "progress": False}
    found = lcsc_search(folders, dies_once, model=Scalar(), workers=2, **settings)
    assert (tmp_path / "died").exists()
    assert found == search(folders, 3.0, iterations=12, generation=4)


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    with pytest.raises(ValueError, match="checkpoints must be at least two"):
        search(folders[:1], 1.0)
    with pytest.raises(ValueError, match="metric must be given, or data instead"):
        lcsc_search(folders, model=Scalar())
    with pytest.raises(ValueError, match=r"metric must be of the form module:function, got 'math'"):
        lcsc_search(folders, "math", model=Scalar())
    with pytest.raises(ValueError, match=r"metric must be a function of math, got 'math:no_such'"):
        lcsc_search(folders, "math:no_such", model=Scalar())
    with pytest.raises(ValueError, match="unknown parameter 'sigmma' of lcsc; did you mean 'sigma'"):
        search(folders, 1.0, sigmma=1.0)
    with pytest.raises(FileNotFoundError, match="data: there is no file or folder"):
        lcsc_search(folders, data=tmp_path / "no_such.jsonl", model=Scalar())
    save_model(folders[1], {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"shapes differ .* w \[2\] instead of \[1\]"):
        search(folders, 1.0)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    more = Scalar()
    more.v = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"model must be one whose tensors the checkpoints all have, got 'v"):
        Candidates(folders, more)
    with pytest.raises(ValueError, match=r"model must be one with the checkpoints' tensors, got 'none of w'"):
        Candidates(folders, nn.Linear(1, 1))
    norm = Scalar()
    norm.norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"batch norms must be a model without them.*'norm'"):
        Candidates(folders, norm)


# By name ------------------------------------------------------------------------------------------


def test_a_config_by_name_searches_and_merges(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (5, 10, 15)]
    for seed, folder in enumerate(folders):
        tiny_llama(seed=seed).save_pretrained(folder)
    rows = [{"input_ids": [(7 * i + j * j) % 256 for j in range(24)]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content: dict[str, Any] = {
        "merge_method": "lcsc",
        "models": [str(tmp_path / "run")],
        "parameters": {"data": str(tmp_path / "rows.jsonl"), "iterations": 6, "window": 1.0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match="tokens are few"):
        result = merge(tmp_path / "config.yaml", tmp_path / "out", progress=False)
    weights = [model["parameters"]["weight"] for model in result.manifest["models"]]
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-9)
    assert result.manifest["merge_method"] == "lcsc"
    rates = len(starts(3, RATES))
    assert len(json.loads((tmp_path / "out.search.json").read_text())["evaluations"]) == 6 + rates
    # The same by the linear merge, with the coefficients from the manifest.
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, weights, strict=True)]
    merge({"merge_method": "linear", "models": models}, tmp_path / "linear", progress=False)
    linear = tensors_of(tmp_path / "linear")
    assert all(torch.equal(value, linear[name]) for name, value in tensors_of(tmp_path / "out").items())
    with pytest.raises(ValueError, match="out must be a new folder; give overwrite"):
        merge(tmp_path / "config.yaml", tmp_path / "out")


def test_the_merge_by_name_refuses_models_without_coefficients_or_metric(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0)
    content = {"merge_method": "lcsc", "models": list(map(str, folders))}
    with pytest.raises(ValueError, match="metric must be given, or data instead"):
        merge(content, tmp_path / "out")


def test_the_result_is_written_by_the_linear_merge(tmp_path: Path) -> None:
    folders = scalar_run(tmp_path / "run", 0.0, 1.0, 4.0)
    model = Scalar()
    found = lcsc_search(folders, distance(3.0), model=model, progress=False)
    merge(found.config(), tmp_path / "out", progress=False)
    written = tensors_of(tmp_path / "out")["w"]
    assert distance(3.0)(types.SimpleNamespace(w=written)) == found.score


def test_adapters_are_combined_by_their_factors(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    import peft

    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    folders: list[Path] = []
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapter = peft.get_peft_model(tiny_llama(), config)
        adapter.peft_config["default"].base_model_name_or_path = str(base)
        folders.append(tmp_path / f"a{number}")
        adapter.save_pretrained(str(folders[-1]))
    rows = [{"input_ids": [(5 * i + j) % 256 for j in range(16)]} for i in range(4)]
    with pytest.warns(UserWarning, match="tokens are few"):
        found = lcsc_search(folders, data=rows, iterations=2, progress=False)
    merge(found.config(), tmp_path / "out", progress=False)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    search_loss, rest = evaluation_losses(rows, base, 0.5)
    assert rest is not None
    with torch.no_grad():
        assert rest(loaded) == found.holdout_score
        assert search_loss(loaded) == found.score


def test_settings_are_those_of_the_class() -> None:
    assert Lcsc().evolution(3) == evolution(seed=3, iterations=200, ema_rates=list(RATES))
