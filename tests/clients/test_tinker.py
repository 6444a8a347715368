"""The real `tinker` SDK trains and samples against `tandem serve`: one process, one copy of the base."""

import math
import os
import random
import subprocess
import sys
import time

import numpy
import pytest

tinker = pytest.importorskip("tinker")

from conftest import Process  # noqa: E402

RANK = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tinker")


def start(folder, *options):
    model = os.environ.get("TANDEM_TEST_MODEL")
    return Process(folder, "serve", "--port", "0", *options, *(["--model", model] if model else []))


@pytest.fixture(scope="module")
def url(folder):
    server = start(folder)
    yield server.url
    server.end()


@pytest.fixture
def service(url):
    return connect(url)


def connect(url):
    os.environ["TINKER_API_KEY"] = "tml-none"
    os.environ["TINKER_TELEMETRY"] = "0"
    return tinker.ServiceClient(base_url=url)


@pytest.fixture(scope="module")
def base(url):
    return connect(url).get_server_capabilities().supported_models[0].model_name


def prompt(*tokens):
    return tinker.ModelInput.from_ints(list(tokens))


def sample(client, tokens, n=1, **params):
    params = {"max_tokens": 8, "temperature": 0, **params}
    return client.sample(prompt(*tokens), n, tinker.SamplingParams(**params)).result()


def test_samples_of_the_base_carry_what_was_asked(service, base):
    client = service.create_sampling_client(base_model=base).result()
    params = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=7, stop=[])
    first = client.sample(prompt(5, 6, 7), 3, params, topk_sample_logprobs=4).result()
    assert len(first.sequences) == 3
    for sequence in first.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 6
        assert sequence.stop_reason == "length"
        assert [len(alternatives) for alternatives in sequence.topk_logprobs] == [4] * 6
        assert all(value <= 0 for value in sequence.logprobs)
    again = client.sample(prompt(5, 6, 7), 3, params).result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in first.sequences]
    assert len({tuple(s.tokens) for s in first.sequences}) > 1
    # A stop token is among the tokens, with its log-probability.
    stop = first.sequences[0].tokens[2]
    stopped = sample(client, (5, 6, 7), temperature=1.0, seed=7, max_tokens=6, stop=[stop]).sequences[0]
    assert stopped.stop_reason == "stop" and stopped.tokens[-1] == stop
    assert stopped.tokens == first.sequences[0].tokens[: len(stopped.tokens)]
    # What is sampled is scored the same when it is a prompt.
    tokens = first.sequences[0].tokens
    scored = client.compute_logprobs(prompt(5, 6, 7, *tokens)).result()
    assert scored[0] is None or math.isnan(scored[0])
    numpy.testing.assert_allclose(scored[3:], first.sequences[0].logprobs, atol=2e-5)


def test_what_is_wrong_fails_by_name(service, base):
    client = service.create_sampling_client(base_model=base).result()
    for words, params in [("vocabulary", dict(tokens=(10**8,))), ("temperature", dict(tokens=(5,), temperature=9.0))]:
        with pytest.raises(Exception, match=words):
            sample(client, **params)
    with pytest.raises(Exception, match="not served here"):
        service.create_lora_training_client("no-such-model", rank=4).result()


def test_the_tokenizer_comes_from_the_server(url, base, tmp_path):
    """As of a client without internet: HF_ENDPOINT is the server."""
    code = f"from transformers import AutoTokenizer; print(AutoTokenizer.from_pretrained({base!r}).encode('Felix'))"
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout.splitlines()[-1])) > 0


# Training. Texts are tokens: what they spell does not matter here.

ADAM = tinker.AdamParams(learning_rate=5e-3)
TEXTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26, 27], [31, 32, 33, 34], [41, 42, 43, 44, 45, 46, 47, 48, 49]]


def trainer(service, base, seed=1, rank=RANK, **kwargs):
    return service.create_lora_training_client(base, rank=rank, seed=seed, **kwargs).result()


def supervised(tokens, weights=None):
    inputs = {"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)}
    return tinker.Datum(model_input=prompt(*tokens[:-1]), loss_fn_inputs=inputs)


def learn(model, data, loss="cross_entropy", adam=ADAM, **config):
    done = model.forward_backward(data, loss, loss_fn_config=config or None)
    step = model.optim_step(adam)
    step.result()
    return done.result()


def logprobs(output):
    return [numpy.asarray(datum["logprobs"].data) for datum in output.loss_fn_outputs]


def greedy(sampler, text):
    return sample(sampler, text[:2], max_tokens=len(text) - 2, stop=[]).sequences[0].tokens


def sampler_of(model, **kwargs):
    return model.save_weights_and_get_sampling_client(**kwargs).result()


def test_supervised_training_learns_what_it_is_shown(service, base):
    """SFT in ten lines: the loss falls to a third and less, greedy samples are the texts; the base and an older snapshot stay."""
    plain = service.create_sampling_client(base_model=base).result()
    before = [greedy(plain, text) for text in TEXTS]
    model = trainer(service, base)
    data = [supervised(text) for text in TEXTS]
    losses = [learn(model, data).metrics["loss:sum"] for _ in range(4)]
    early = sampler_of(model)
    after_four = [greedy(early, text) for text in TEXTS]
    losses += [learn(model, data).metrics["loss:sum"] for _ in range(56)]
    late = sampler_of(model)
    assert losses[29] < losses[0] / 3, losses
    assert [greedy(late, text) for text in TEXTS] == [text[2:] for text in TEXTS]
    assert [greedy(early, text) for text in TEXTS] == after_four
    assert [greedy(plain, text) for text in TEXTS] == before


def test_reinforcement_by_a_rule(service, base):
    """Importance sampling, twenty lines: the reward is the share of tokens below 200."""
    def reward(tokens):
        return sum(token < 200 for token in tokens) / len(tokens)

    model = trainer(service, base, seed=3)
    rewards = []
    for step in range(25):
        sampler = sampler_of(model)
        params = tinker.SamplingParams(max_tokens=10, temperature=1.0, seed=100 * step, stop=[])
        sequences = sampler.sample(prompt(5, 6, 7), 16, params).result().sequences
        scores = numpy.array([reward(s.tokens) for s in sequences])
        rewards.append(scores.mean())
        data = []
        for s, advantage in zip(sequences, scores - scores.mean()):
            inputs = [5, 6, 7, *s.tokens[:-1]]
            rows = {
                "target_tokens": [6, 7, *s.tokens],
                "logprobs": [0.0] * 2 + list(s.logprobs),
                "advantages": [0.0] * 2 + [float(advantage)] * len(s.tokens),
            }
            data.append(tinker.Datum(model_input=prompt(*inputs), loss_fn_inputs=rows))
        learn(model, data, "importance_sampling", tinker.AdamParams(learning_rate=5e-3))
    assert numpy.mean(rewards[-3:]) > 2 * numpy.mean(rewards[:2]) or numpy.mean(rewards[-3:]) > 0.95, rewards


def test_samplers_scorers_and_the_trainer_agree(service, base):
    model = trainer(service, base, seed=5)
    for _ in range(3):
        learn(model, [supervised(text) for text in TEXTS])
    sampler = sampler_of(model)
    params = tinker.SamplingParams(max_tokens=20, temperature=1.0, seed=1, stop=[])
    found = sampler.sample(prompt(5, 6, 7), 2, params).result().sequences
    worst = {}
    for sequence in found:
        whole = [5, 6, 7, *sequence.tokens]
        scored = numpy.array(sampler.compute_logprobs(prompt(*whole)).result()[3:], dtype=float)
        trained = logprobs(model.forward([supervised(whole)], "cross_entropy").result())[0][2:]
        for name, other in [("scored", scored), ("trained", trained)]:
            worst[name] = max(worst.get(name, 0.0), float(abs(other - numpy.array(sequence.logprobs)).max()))
    print("largest differences of log-probabilities:", worst)
    assert worst["scored"] == 0 and worst["trained"] < 1e-4, worst


def policy_data(seed):
    random.seed(seed)
    data = []
    for text in TEXTS:
        n = len(text) - 1
        data.append({
            "tokens": text,
            "logprobs": [random.uniform(-9, -3) for _ in range(n)],
            "advantages": [random.choice([-2.0, -0.5, 0.7, 3.0]) for _ in range(n)],
        })
    return data


def as_datum(row):
    inputs = {"target_tokens": row["tokens"][1:], "logprobs": row["logprobs"], "advantages": row["advantages"]}
    return tinker.Datum(model_input=prompt(*row["tokens"][:-1]), loss_fn_inputs=inputs)


def expected_loss(name, p, row, config):
    """The documentation's formulas, in numpy."""
    q, a = (numpy.array(row[name], dtype=numpy.float32).astype(numpy.float64) for name in ("logprobs", "advantages"))
    r = numpy.exp(p - q)
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    if name == "importance_sampling":
        return -(r * a).sum(), r * a
    if name == "ppo":
        return -numpy.minimum(r * a, numpy.clip(r, low, high) * a).sum(), numpy.where(r * a <= numpy.clip(r, low, high) * a, r * a, 0)
    if name == "cispo":
        return -(numpy.clip(r, low, high) * p * a).sum(), numpy.clip(r, low, high) * a
    if name == "dro":
        return -(p * a - config["beta"] / 2 * (p - q) ** 2).sum(), a - config["beta"] * (p - q)
    s = numpy.exp((p - q).mean())
    bound = numpy.clip(s, low, high)
    return -numpy.minimum(s * a, bound * a).sum(), numpy.where(s * a <= bound * a, s * a, 0)


CLIP = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.9}
LOSSES = {"importance_sampling": {}, "ppo": CLIP, "cispo": CLIP, "dro": {"beta": 0.05}, "gspo": CLIP}
# So large an eps that a step of AdamW is a step along the gradient, and small.
PLAIN = tinker.AdamParams(learning_rate=1.0, beta1=0.0, beta2=0.0, eps=300.0)



def same_move(one, other, start):
    """Sums in another order round to other bfloat16 numbers of the adapter here and there; what is left out or counted twice is
    no such small part of the way."""
    way = abs(one - start).max()
    assert way > 1e-3, "nothing moved"
    assert abs(one - other).max() < 0.02 * way, (abs(one - other).max(), way)


def moved(service, base, calls, steps=PLAIN):
    """Log-probabilities of the texts after one step with the gradients of `calls`, of a model whose B is not zero."""
    model = trainer(service, base, seed=9)
    learn(model, [supervised(TEXTS[0])])
    for data, loss, config in calls:
        model.forward_backward(data, loss, loss_fn_config=config or None)
    model.optim_step(steps).result()
    return numpy.concatenate(logprobs(model.forward([supervised(text) for text in TEXTS], "cross_entropy").result()))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_numpy(service, base, name):
    config = LOSSES[name]
    rows = policy_data(2)
    model = trainer(service, base, seed=9)
    learn(model, [supervised(TEXTS[0])])
    found = model.forward([as_datum(row) for row in rows], name, loss_fn_config=config or None).result()
    plain = model.forward([supervised(row["tokens"]) for row in rows], "cross_entropy").result()
    expected = [expected_loss(name, p.astype(numpy.float64), row, config) for p, row in zip(logprobs(plain), rows)]
    numpy.testing.assert_allclose(found.metrics["loss:sum"], sum(loss for loss, _ in expected), rtol=1e-5)
    numpy.testing.assert_array_equal(numpy.concatenate(logprobs(found)), numpy.concatenate(logprobs(plain)))
    # Cross-entropy with numpy's derivatives as weights (of any sign) moves the model to the same numbers.
    direct = moved(service, base, [([as_datum(row) for row in rows], name, config)])
    weighted = [supervised(row["tokens"], [float(w) for w in slope]) for row, (_, slope) in zip(rows, expected)]
    by_weights = moved(service, base, [(weighted, "cross_entropy", None)])
    same_move(direct, by_weights, numpy.concatenate(logprobs(plain)))


def test_beyond_the_clip_nothing_moves(service, base):
    row = policy_data(3)[0]
    n = len(row["logprobs"])
    far = {**row, "logprobs": [-60.0] * n, "advantages": [1.0] * n}
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    still = moved(service, base, [([as_datum(far)], "ppo", config)])
    # Weights of zero make no gradient at all.
    nothing = moved(service, base, [([supervised(row["tokens"], [0.0] * n)], "cross_entropy", None)])
    numpy.testing.assert_array_equal(still, nothing)


def test_gradients_are_sums_over_calls_and_weights(service, base):
    data = [supervised(text) for text in TEXTS]
    start = moved(service, base, [([supervised(text, [0.0] * (len(text) - 1)) for text in TEXTS], "cross_entropy", None)])
    together = moved(service, base, [(data, "cross_entropy", None)])
    same_move(together, moved(service, base, [([datum], "cross_entropy", None) for datum in data]), start)
    doubled = moved(service, base, [([supervised(text, [2.0] * (len(text) - 1)) for text in TEXTS], "cross_entropy", None)])
    same_move(doubled, moved(service, base, [(data, "cross_entropy", None)] * 2), start)
    assert abs(doubled - together).max() > 0.2 * abs(together - start).max()
    # Several targets of a token are a sum, too.
    rows = {"target_tokens": numpy.array([[12, 50], [13, 51], [14, 52]]),
            "weights": numpy.array([[1.0, 0.5], [1.0, -0.25], [0.0, 1.0]], dtype=numpy.float32)}
    many = tinker.Datum(model_input=prompt(11, 12, 13), loss_fn_inputs=rows)
    one = supervised([11, 12, 13, 14], [1.0, 1.0, 0.0])
    rows = {"target_tokens": [50, 51, 52], "weights": [0.5, -0.25, 1.0]}
    other = tinker.Datum(model_input=prompt(11, 12, 13), loss_fn_inputs=rows)
    same_move(moved(service, base, [([many], "cross_entropy", None)]),
              moved(service, base, [([one, other], "cross_entropy", None)]), start)


def test_a_bad_call_fails_alone(service, base):
    model = trainer(service, base, seed=11)
    bad = model.forward_backward([supervised([5, 10**7, 6])], "cross_entropy")
    good = model.forward([supervised(TEXTS[0])], "cross_entropy")
    with pytest.raises(Exception, match="vocabulary"):
        bad.result()
    assert len(logprobs(good.result())[0]) == len(TEXTS[0]) - 1
    with pytest.raises(Exception, match="no step was made"):
        model.optim_step(ADAM).result()
    learn(model, [supervised(TEXTS[0])])
    for words, call in [
        ("none of", lambda: model.forward([supervised(TEXTS[0])], "no_such_loss")),
        ("means nothing", lambda: model.forward([supervised(TEXTS[0])], "ppo", loss_fn_config={"beta": 1.0})),
        ("logprobs must have", lambda: model.forward([supervised(TEXTS[0])], "ppo")),
        ("learning_rate", lambda: model.optim_step(tinker.AdamParams(learning_rate=-1.0))),
        ("cannot name", lambda: model.save_state("a b")),
    ]:
        with pytest.raises(Exception, match=words):
            call().result()


def test_what_clients_train_side_by_side_is_what_each_trains_alone(url, service, base):
    def train(client, seed):
        model = trainer(client, base, seed=seed)
        for _ in range(4):
            learn(model, [supervised(text) for text in TEXTS])
        return logprobs(model.forward([supervised(text) for text in TEXTS], "cross_entropy").result())

    alone = [train(service, seed) for seed in (21, 22)]
    import threading
    beside, stop = {}, threading.Event()
    plain = service.create_sampling_client(base_model=base).result()

    def load():
        while not stop.is_set():
            sample(plain, TEXTS[1][:3], max_tokens=16)

    threads = [threading.Thread(target=lambda s=seed: beside.update({s: train(connect(url), s)})) for seed in (21, 22)]
    loader = threading.Thread(target=load)
    loader.start()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    stop.set()
    loader.join()
    for expected, seed in zip(alone, (21, 22)):
        numpy.testing.assert_array_equal(numpy.concatenate(expected), numpy.concatenate(beside[seed]))


def test_inflight_samplers_follow(service, base):
    model = trainer(service, base, seed=13)
    first = sampler_of(model, kind="inflight")
    before = first.compute_logprobs(prompt(*TEXTS[0])).result()[1:]
    for _ in range(3):
        learn(model, [supervised(TEXTS[0])])
    assert first.compute_logprobs(prompt(*TEXTS[0])).result()[1:] == before
    second = sampler_of(model, kind="inflight")
    after = second.compute_logprobs(prompt(*TEXTS[0])).result()[1:]
    assert after != before and first.compute_logprobs(prompt(*TEXTS[0])).result()[1:] == after


def test_checkpoints_outlive_a_kill(tmp_path, base):
    """Five steps after kill -9 and a load are the five that follow without."""
    server = start(tmp_path)
    try:
        service = connect(server.url)
        model = trainer(service, base, seed=17)
        data = [supervised(text) for text in TEXTS]
        for _ in range(3):
            learn(model, data)
        path = model.save_state("three").result().path
        named = model.save_weights_for_sampler("for-all").result().path
        with pytest.raises(Exception, match="exists"):
            model.save_state("three").result()
        expected = [learn(model, data).metrics["loss:sum"] for _ in range(5)]
        greedily = greedy(service.create_sampling_client(model_path=named).result(), TEXTS[0])
        lost = model.forward_backward(data * 200, "cross_entropy")
    finally:
        server.process.kill()
        server.process.wait()
    began = time.time()
    server = start(tmp_path)
    try:
        service = connect(server.url)
        model = service.create_training_client_from_state_with_optimizer(path).result()
        assert [learn(model, data).metrics["loss:sum"] for _ in range(5)] == expected
        sampler = service.create_sampling_client(model_path=named).result()
        assert greedy(sampler, TEXTS[0]) == greedily
        rest = service.create_rest_client()
        info = rest.get_weights_info_by_tinker_path(path).result()
        assert (info.base_model, info.lora_rank, info.train_mlp, info.train_unembed) == (base, RANK, True, True)
        paths = {checkpoint.tinker_path for checkpoint in rest.list_user_checkpoints().result().checkpoints}
        assert paths == {path, named}
        runs = rest.list_training_runs().result().training_runs
        assert path.split("/")[2] in [run.training_run_id for run in runs]
        # A checkpoint for sampling is a model's name on every route.
        import openai
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        answer = client.completions.create(model=named, prompt=TEXTS[0][:2], max_tokens=4, temperature=0)
        assert answer.choices[0].text
        rest.delete_checkpoint_from_tinker_path(named).result()
        assert named not in [model.id for model in client.models.list().data]
        with pytest.raises(Exception, match="No such checkpoint"):
            service.create_sampling_client(model_path=named).result()
        without_head = trainer(service, base, train_unembed=False)
        with pytest.raises(Exception, match="down_proj, lm_head; this model has .* down_proj"):
            without_head.load_state(path).result()
        fresh = service.create_training_client_from_state(path).result()
        assert [learn(fresh, data).metrics["loss:sum"] for _ in range(2)][1] != expected[1]
        del lost
    finally:
        server.end()
    assert time.time() - began < 120
