"""Chapter 14: sampling settings and log-probabilities of requests, on the engine, in any company."""

import json
import math

import numpy as np
import pytest
from make_models import make_hf_model
from numba import cuda
from test_engine import SMALL
from test_engines import random_model

from ch14_mini_llm import offline
from ch14_mini_llm.engine.engine import Engine
from ch14_mini_llm.engine.plan import Part
from ch14_mini_llm.engine.request import GREEDY, MAX_BIASES, Request, RequestError, Sampling
from ch14_mini_llm.engine.sequence import ENDED, RUNNING, Sequence
from ch14_mini_llm.forward import sampler as sampler_module
from ch14_mini_llm.forward.sampler import ADJUSTS, DRAWS, LIKELIEST, RowSampler
from ch14_mini_llm.levels.generate import generate
from ch14_mini_llm.model.upload import panels_model
from ch14_mini_llm.naive.gpt2 import GPT2
from chapters.ch13_llm_ops.sampling_rows import (
    MAX_TOP,
    adjust_reference,
    counts_of,
    draw_row_reference,
    logprobs_reference,
)

V = SMALL["vocab_size"]
NAN, INF = float("nan"), float("inf")
PENALTIES = Sampling(0.8, seed=3, presence_penalty=0.4, frequency_penalty=0.6, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def weights():
    return random_model(3, **SMALL)


@pytest.fixture(scope="module")
def model(weights):
    return panels_model(*weights)


@pytest.fixture(scope="module")
def listing(weights):
    return GPT2(*weights)


def prompt_of(n, seed=0):
    return np.random.default_rng([n, seed]).integers(0, V, n).tolist()


def run(model, *requests, **options):
    engine = Engine(model, **{"num_blocks": 60, **options})
    results = engine.run(requests)
    engine.check()
    return results, engine


def alone(model, request):
    (result,), _ = run(model, request, max_batch=1, max_rows=100, prefix_cache=False)
    assert result.error is None
    return result


def crowd(n):
    """Neighbours with all kinds of settings."""
    biased, filtered = Sampling(logit_bias={5: 3.5, 60: -100}), Sampling(top_k=7, top_p=0.8, min_p=0.05)
    kinds = [None, Sampling(1.2), Sampling(0, frequency_penalty=1.5), PENALTIES, biased, filtered]
    return [Request(prompt_of(3 + i % 20, i), 10 + i % 5, kinds[i % len(kinds)]) for i in range(n)]


# --- the same in any company -----------------------------------------------------------------------------------------

SEEDED = [Sampling(0.9, seed=2**64 - 5), Sampling(1.1, top_k=20, top_p=0.9, min_p=0.02, seed=7), PENALTIES,
          Sampling(seed=1, logit_bias={3: 2.0, 9: -100.0}, repetition_penalty=0.8)]  # fmt: skip


@pytest.mark.parametrize("sampling", SEEDED, ids=range(len(SEEDED)))
@pytest.mark.parametrize(
    "options",
    [{"max_batch": 32}, {"max_batch": 5, "max_rows": 9}, {"num_blocks": 7, "max_batch": 6}, {"block_size": 4}],
    ids=["batch", "chunks", "preempted", "blocks of 4"],
)
def test_a_seeded_request_is_the_same_in_any_company(model, sampling, options):
    request = Request(prompt_of(17), 14, sampling, logprobs=3)
    wanted = alone(model, request)
    others = crowd(31)
    results, engine = run(model, *others[:15], request, *others[15:], request, **options)
    for result in (results[15], results[-1]):
        assert (result.tokens, result.logprobs, result.seed) == (wanted.tokens, wanted.logprobs, sampling.seed)
    if options.get("num_blocks") == 7:
        assert engine.stats()["preemptions"] > 0


def test_a_preempted_request_is_counted_again(model):
    """Lowest in priority, it is the one to give way, while its penalties depend on what it has written."""
    request = Request(prompt_of(9), 30, PENALTIES, priority=-1)
    wanted = alone(model, request)
    results, _ = run(model, *(Request(prompt_of(8, i), 25, Sampling(seed=i)) for i in range(3)), request,
                     num_blocks=8, max_batch=4)  # fmt: skip
    assert results[-1].preemptions > 0 and results[-1].tokens == wanted.tokens


def test_without_a_seed_one_is_drawn_and_returned(model):
    request = Request(prompt_of(5), 12, Sampling(1.5))
    first, second = run(model, request, request)[0]
    assert first.seed != second.seed and first.tokens != second.tokens
    again = run(model, Request(request.tokens, 12, Sampling(1.5, seed=first.seed)))[0][0]
    assert (again.tokens, again.seed) == (first.tokens, first.seed)
    assert run(model, Request([1], 1))[0][0].seed is None


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 1e-12, 1e-6, GREEDY])
def test_small_temperatures_are_greedy(model, listing, temperature):
    wanted = alone(model, Request(prompt_of(6), 10)).tokens
    sampling = Sampling(temperature, top_k=30, top_p=0.5, min_p=0.3)
    assert alone(model, Request(prompt_of(6), 10, sampling)).tokens == wanted
    assert list(generate(listing, prompt_of(6), 10, Sampling(temperature))) == wanted


def test_min_p_1_is_greedy(model):
    request = Request(prompt_of(6), 10)
    assert alone(model, Request(request.tokens, 10, Sampling(2.0, min_p=1))).tokens == alone(model, request).tokens


def test_top_k_0_and_minus_1_are_off(model):
    tokens = [alone(model, Request(prompt_of(6), 10, Sampling(1.5, top_k=k, seed=4))).tokens for k in (0, -1, None, V)]
    assert tokens == [tokens[0]] * 4


def test_steps_are_the_references(model, listing):
    """With penalties and biases, drawn or not: each token is what NumPy makes of the listing's logits."""
    biases = {5: 1.5, 60: -3.0}
    for sampling in (PENALTIES, Sampling(0, frequency_penalty=0.7), Sampling(0, repetition_penalty=1.9),
                     Sampling(seed=9, logit_bias=biases, presence_penalty=-1, min_p=0.02)):  # fmt: skip
        prompt = prompt_of(11)
        result = alone(model, Request(prompt, 12, sampling))
        logits = listing.logits_all(prompt + result.tokens)[len(prompt) - 1 :]
        s = sampling
        for step, token in enumerate(result.tokens):
            counts = counts_of(prompt, result.tokens[:step], V)
            how = s.presence_penalty, s.frequency_penalty, s.repetition_penalty, s.logit_bias
            adjusted = adjust_reference(logits[step], counts, *how)
            temperature = 0 if s.greedy else s.temperature
            assert token == draw_row_reference(adjusted, temperature, 0, s.top_p, s.min_p, s.seed or 0, step)


def test_biases_force_and_forbid(model):
    forced = alone(model, Request(prompt_of(4), 5, Sampling(logit_bias={17: 100}), logprobs=0))
    assert forced.tokens == [17] * 5
    assert max(score.logprob for score in forced.logprobs) < -0.5  # the model's opinion, not the bias's
    likeliest = alone(model, Request(prompt_of(4), 8)).tokens
    banned = alone(model, Request(prompt_of(4), 8, Sampling(0, logit_bias=dict.fromkeys(likeliest, -100))))
    assert not set(likeliest) & set(banned.tokens)


@pytest.mark.parametrize("repetition", [1e-300, 1e-38, 1e38, 1e300])
def test_the_widest_penalties_make_no_nan(model, repetition):
    sampling = Sampling(repetition_penalty=repetition, presence_penalty=2, frequency_penalty=-2, seed=1)
    assert len(alone(model, Request(prompt_of(4), 6, sampling)).tokens) == 6


WRONG = [
    *(("temperature", value) for value in (NAN, INF, -1, "0.5", True, None, 10**400)),
    *(("top_p", value) for value in (0, -0.1, 1.01, NAN, INF, "0.5", True)),
    *(("min_p", value) for value in (-0.1, 1.01, NAN, "0.5", False)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, NAN, INF, "0", True)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN, -INF, None)),
    *(("repetition_penalty", value) for value in (0, -1, NAN, INF, "1")),
    *(("top_k", value) for value in (-2, 1.5, NAN, "5", True, 2**31)),
    *(("seed", value) for value in (-1, 2**64, 1.0, "7", True)),
    *(("logit_bias", value) for value in (
        [1], {"x": 1}, {-1: 1}, {1.5: 1}, {True: 1}, {1: NAN}, {1: INF}, {1: 101}, {1: -101}, {1: "3"}, {1: True},
        {1: None}, dict.fromkeys(range(MAX_BIASES + 1), 1), {"²": 1},
    )),
]  # fmt: skip


@pytest.mark.parametrize("field, value", WRONG, ids=[f"{name}-{str(value)[:12]}" for name, value in WRONG])
def test_wrong_settings_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field} ") as refused:
        Sampling(**{field: value})
    assert refused.value.field == field and len(str(refused.value)) < 250


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, MAX_TOP + 1, 1.5, "3", True])
def test_wrong_numbers_of_log_probabilities_are_refused(model, field, value):
    bad, good = run(model, Request([1], 1, **{field: value}), Request([1], 1))[0]
    assert f"{field} is {value!r}" in bad.error and "from 0 to 20" in bad.error and good.error is None


def test_biases_of_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(RequestError, match=f"token id {V}, not in .* 0 to {V - 1}") as refused:
        Engine(model, num_blocks=4).submit(Request([1], 1, Sampling(logit_bias={3: 1, V: 1})))
    assert refused.value.field == "logit_bias"
    assert Sampling(logit_bias={"7": 1}).logit_bias == {7: 1.0} and Sampling(logit_bias={}).logit_bias is None


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"presence_penalty": 1}, {"frequency_penalty": 1},
                                     {"repetition_penalty": 2}, {"logit_bias": {1: 1}}], ids=str)  # fmt: skip
def test_the_levels_refuse_what_only_the_engine_knows(listing, setting):
    with pytest.raises(RequestError, match=next(iter(setting))):
        generate(listing, [1], 1, Sampling(**setting))


# --- log-probabilities -----------------------------------------------------------------------------------------------


def check_scores(scores, logits, tokens, n_top):
    for score, row, token in zip(scores, logits, tokens, strict=True):
        logprob, rank, ids, top = logprobs_reference(row, token, n_top)
        assert math.isclose(score.logprob, logprob, abs_tol=1e-5) and score.rank == rank
        assert list(score.top) == ids.tolist()
        np.testing.assert_allclose(list(score.top.values()), top, atol=1e-5)


@pytest.mark.parametrize("n_top", [0, 1, MAX_TOP])
def test_log_probabilities_are_of_the_models_logits(model, listing, n_top):
    prompt = prompt_of(19)
    request = Request(prompt, 9, PENALTIES, logprobs=n_top, prompt_logprobs=n_top)
    result = alone(model, request)
    logits = listing.logits_all(prompt + result.tokens)
    check_scores(result.logprobs, logits[len(prompt) - 1 : -1], result.tokens, n_top)
    assert result.prompt_logprobs[0] is None
    check_scores(result.prompt_logprobs[1:], logits[: len(prompt) - 1], prompt[1:], n_top)


def test_log_probabilities_are_transformers(torch, transformers, tmp_path):
    path, theirs = make_hf_model(tmp_path, 2, 2, 32, 96, V, seed=5)
    prompt = prompt_of(23)
    engine = Engine.from_file(path, num_blocks=20)
    (result,) = engine.run([Request(prompt, 6, logprobs=2, prompt_logprobs=2)])
    text = prompt + result.tokens
    with torch.no_grad():
        wanted = torch.log_softmax(theirs(torch.tensor([text])).logits[0].double(), -1).numpy()
    assert result.prompt_logprobs[0] is None
    scores = [*result.prompt_logprobs[1:], *result.logprobs]
    for score, row, token in zip(scores, wanted[:-1], text[1:], strict=True):
        assert math.isclose(score.logprob, row[token], abs_tol=1e-4)
        np.testing.assert_allclose(list(score.top.values()), np.sort(row)[::-1][:2], atol=1e-4)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
def test_prompts_in_chunks_and_on_a_warm_cache_score_the_same(model, n):
    request = Request(prompt_of(n), 4, prompt_logprobs=5, logprobs=1)
    wanted = alone(model, request)
    assert len(wanted.prompt_logprobs) == n and wanted.prompt_logprobs[0] is None
    plain = Request(request.tokens, 4)
    for options in ({"max_batch": 2, "max_rows": 5 + 2}, {"block_size": 4}):
        results, _ = run(model, plain, *crowd(4), request, request, **options)
        for result in results[-2:]:
            assert result.prompt_logprobs == wanted.prompt_logprobs and result.tokens == wanted.tokens
            assert result.logprobs == wanted.logprobs and result.cached_tokens == 0


def test_a_prompt_alone_can_be_scored(model):
    wanted = alone(model, Request(prompt_of(40), 1, prompt_logprobs=0)).prompt_logprobs
    whole = prompt_of(SMALL["n_ctx"])
    scored, full, empty = run(model, Request(prompt_of(40), 0, prompt_logprobs=0),
                              Request(whole, 0, prompt_logprobs=2), Request([1], 0, prompt_logprobs=1))[0]  # fmt: skip
    assert scored.prompt_logprobs == wanted and scored.tokens == [] and scored.finish_reason == "length"
    assert len(full.prompt_logprobs) == len(whole) and full.error is None
    assert empty.prompt_logprobs == (None,)


def test_a_preempted_prompt_scores_the_same(model):
    """It gives way between two chunks of its prompt, and again while it decodes; it is handed out once."""
    request = Request(prompt_of(40), 20, prompt_logprobs=3, logprobs=2, priority=-1)
    wanted = alone(model, request)
    engine = Engine(model, num_blocks=15, block_size=4, max_batch=3, max_rows=6)
    requests = [Request(prompt_of(6, i), 22) for i in range(2)]
    handed = []
    *_, result = engine.run([*requests, request], on_output=lambda output: handed.append(output.prompt_logprobs))
    assert result.preemptions > 0 and result.prompt_logprobs == wanted.prompt_logprobs
    assert result.logprobs == wanted.logprobs and sum(map(bool, handed)) == 1
    engine.check()


# --- no number among the logits --------------------------------------------------------------------------------------


def broken_at(weights, position):
    config, tensors = weights
    wpe = tensors["wpe.weight"].copy()
    wpe[position] = np.nan
    return panels_model(config, {**tensors, "wpe.weight": wpe})


def test_a_position_of_nan_ends_its_request_in_valid_json(weights, model):
    long, short = prompt_of(30), prompt_of(9)
    lines = [
        {"tokens": short, "max_new": 8, "temperature": 0.7, "seed": 5, "logprobs": 2},
        {"tokens": long, "max_new": 8, "logprobs": 2}, {"tokens": long, "max_new": 8, "temperature": 1, "min_p": 0.1},
        {"tokens": long, "max_new": 0, "prompt_logprobs": 3}, {"tokens": short, "max_new": 8, "prompt_logprobs": 1},
        {"tokens": short, "max_new": 20, "seed": 2, "frequency_penalty": 0.5, "logit_bias": {"3": 1.5}},
    ]  # fmt: skip
    lines = [json.dumps(line).encode() for line in lines]
    engines = Engine(broken_at(weights, 25)), Engine(model)
    found, wanted = ([json.loads(json.dumps(result, allow_nan=False)) for result in
                      offline.results(engine, lines, {"max_new": 4}, on_end=lambda: None)]
                     for engine in engines)  # fmt: skip
    assert [result["finish_reason"] for result in found] == ["length", *["error"] * 3, "length", "error"]
    assert found[0] == wanted[0] and found[4] == wanted[4] and len(found[0]["logprobs"]) == 8
    assert all("NaN" in result["error"] for result in found[1:4])
    assert found[5]["tokens"] == wanted[5]["tokens"][: len(found[5]["tokens"])] and len(found[5]["tokens"]) == 17
    assert engines[0].stats()["corrupted_requests"] == 4 and engines[1].stats()["corrupted_requests"] == 0
    assert found[4]["prompt_logprobs"][0] is None and set(found[0]["logprobs"][0]) == {"logprob", "rank", "top"}
    engines[0].check()


# --- what is launched and copied -------------------------------------------------------------------------------------


def sequence(i, sampling, n_prompt=3, **options):
    return Sequence(i, list(range(n_prompt)), 90, i, sampling=sampling, state=RUNNING, **options)


def part(of):
    """The next step of a sequence, as if all its tokens had been run over but the last."""
    return Part(of, len(of.tokens) - 1, 1, True, of.life)


def test_what_rows_need(model):
    rows = RowSampler(4, V)
    for settings, wanted in [
        ([], LIKELIEST), ([None, Sampling(0)], LIKELIEST), ([None, Sampling(seed=1)], DRAWS),
        ([Sampling(seed=1), Sampling(0, presence_penalty=1)], ADJUSTS), ([Sampling(0, logit_bias={1: 1})], ADJUSTS),
    ]:  # fmt: skip
        rows.set([part(sequence(i, s and s.seeded())) for i, s in enumerate(settings)])
        assert rows.draws == wanted


def test_settings_are_copied_only_when_they_change(monkeypatch, rng):
    rows = RowSampler(4, V)
    copies = []
    upload = rows._upload
    monkeypatch.setattr(rows, "_upload", lambda *arguments: copies.append(1) or upload(*arguments))
    logits, chosen = cuda.to_device(rng.standard_normal((4, V), dtype=np.float32)), cuda.device_array(4, np.int32)
    alive = [sequence(i, PENALTIES if i == 1 else Sampling(seed=i)) for i in range(3)]

    def step(members, n=None):
        rows.set([part(one) for one in members])
        rows.choose(logits, chosen, n or len(members))
        for one, token in zip(members, chosen.copy_to_host()):
            assert token == expected(one, logits.copy_to_host()[members.index(one)])
            one.tokens.append(int(token))
        return len(copies)

    def expected(one, row):
        s, new = one.sampling, one.tokens[3:]
        if s.penalises:
            penalties = s.presence_penalty, s.frequency_penalty, s.repetition_penalty
            row = adjust_reference(row, counts_of(one.tokens[:3], new, V), *penalties)
        return draw_row_reference(row, s.temperature, 0, 1.0, 0.0, s.seed, len(new))

    assert [step(alive) for _ in range(4)] == [1, 1, 1, 1]
    assert step(alive, n=4) == 1  # a row of padding
    assert step(alive[1:]) == 2 and step(alive[1:]) == 2  # a row has left; its neighbours' counts stay where they are
    alive[1].life += 1  # as a preemption does
    assert step(alive[1:]) == 3
    rows.forget()
    assert step(alive[1:]) == 4
    alive[1].state = ENDED
    newer = [sequence(i, PENALTIES) for i in range(5, 9)]
    assert step(newer) == 5 and len(rows._slots) == 4  # all slots are needed: those of the ended come back


def test_greedy_rows_launch_chapter_7_alone(monkeypatch, rng):
    rows = RowSampler(2, V)
    for name in ("adjust_rows", "bin_rows", "pick_rows", "count_tokens"):
        monkeypatch.setattr(sampler_module, name, None)
    logits, chosen = rng.standard_normal((2, V), dtype=np.float32), cuda.device_array(2, np.int32)
    rows.set([part(sequence(0, None)), part(sequence(1, Sampling(0)))])
    rows.choose(cuda.to_device(logits), chosen, 2)
    assert chosen.copy_to_host().tolist() == logits.argmax(axis=1).tolist() and rows._bins is None
