"""OpenTelemetry traces, sent to a collector of the test's own: whose span is whose, from a request to the engine's step and to a
quantum of training, lines of batches and calls of a training client among them; and a collector that is away."""

import http.server
import json
import threading
import time

import openai
import pytest
import tinker
from conftest import Process

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes OTLP over HTTP; `spans` are those that came, their attributes as a dictionary."""

    def __init__(self):
        self.spans, self.resources, self.headers = [], [], []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, self.headers, json.loads(body))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path, headers, message):
        assert path == "/v1/traces" and headers["content-type"] == "application/json"
        self.headers.append(dict(headers))
        for resource in message["resourceSpans"]:
            self.resources.append(attributes(resource["resource"]))
            for scope in resource["scopeSpans"]:
                self.spans += [{**span, "attributes": attributes(span)} for span in scope["spans"]]

    def of(self, trace):
        return [span for span in self.spans if span["traceId"] == trace]

    def wait(self, until):
        for _ in range(200):
            if until(self):
                return
            time.sleep(0.1)
        raise AssertionError([(span["name"], span["attributes"]) for span in self.spans])


def attributes(holder):
    values = {one["key"]: next(iter(one["value"].items())) for one in holder["attributes"]}
    return {key: int(value) if kind == "intValue" else value for key, (kind, value) in values.items()}


def children(spans, parent):
    return [span for span in spans if span.get("parentSpanId") == parent["spanId"]]


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.server.shutdown()


@pytest.mark.parametrize("kind", ["serve", "router"])
def test_a_request_is_traced_to_the_engines_steps(tmp_path, collector, monkeypatch, kind):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "answers")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=a%20b")
    traced = ["--otlp-traces-endpoint", collector.url]
    if kind == "serve":
        processes = [Process(tmp_path, "serve", "--port", "0", *traced)]
    else:
        backend = Process(tmp_path, "backend", "--listen", "127.0.0.1:0", *traced)
        processes = [Process(tmp_path, "router", "--port", "0", "--backend", backend.url, *traced), backend]
    client = openai.OpenAI(base_url=processes[0].url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id

    def ask(flags, stream):
        asked = dict(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0.5, stream=stream)
        header = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "x-request-id": f"mine-{flags}"}
        answer = client.chat.completions.create(**asked, extra_body={"ignore_eos": True}, extra_headers=header)
        return list(answer) if stream else answer

    ask("00", False)  # whoever asks keeps nothing of this one
    usage = ask("01", False).usage
    ask("01", True)
    for process in processes:
        process.end()  # what waits is sent
    assert {resource["service.name"] for resource in collector.resources} == {"answers"}
    assert collector.headers[0]["x-token"] == "a b"

    spans = collector.of(TRACE)
    requests = [span for span in spans if span.get("parentSpanId") == PARENT]
    assert [span["name"] for span in requests] == ["POST /v1/chat/completions"] * 2
    assert len({span["spanId"] for span in spans}) == len(spans)
    for request in requests:
        assert request["kind"] == 2
        assert request["attributes"]["http.response.status_code"] == 200
        assert request["attributes"]["http.route"] == "/v1/chat/completions"
        assert request["attributes"]["tandem.request_id"] == "mine-01"
        [call] = children(spans, request)
        assert call["name"] == "llm_request"
        said = call["attributes"]
        assert said["gen_ai.response.model"] == model and said["gen_ai.request.temperature"] == 0.5
        assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.n"]) == (5, 1)
        assert said["gen_ai.usage.prompt_tokens"] == usage.prompt_tokens
        assert said["gen_ai.usage.completion_tokens"] == 5
        assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
        stages = sorted(children(spans, call), key=lambda span: int(span["startTimeUnixNano"]))
        assert [stage["name"] for stage in stages] == ["queued", "prefill", "decode"]
        steps = [children(spans, stage) for stage in stages]
        assert [len(steps[0]), len(steps[1]) > 0, len(steps[2])] == [0, True, 4]
        for stage, within in zip(stages, steps):
            for step in within:
                assert step["name"] == "engine step" and step["attributes"]["tandem.sequences"] == 1
                for edge, sign in (("startTimeUnixNano", 1), ("endTimeUnixNano", -1)):
                    assert (int(step[edge]) - int(stage[edge])) * sign >= 0
    # One that nobody traces begins a trace, and one with an error says so.
    assert any(span["name"] == "GET /v1/models" and "parentSpanId" not in span for span in collector.spans)
    assert not any(span["attributes"].get("tandem.request_id") == "mine-00" for span in collector.spans)


def test_training_is_traced_to_its_quanta(tmp_path, collector, training_file):
    server = Process(tmp_path, "serve", "--port", "0", "--otlp-traces-endpoint", collector.url)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    file = client.files.create(file=training_file, purpose="fine-tune")
    model = client.models.list().data[0].id
    job = client.fine_tuning.jobs.create(model=model, training_file=file.id, extra_body={"max_steps": 3})
    for _ in range(600):
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in ("succeeded", "failed"):
            break
        time.sleep(0.1)
    assert job.status == "succeeded"
    server.end()
    steps = [span for span in collector.spans if span["name"] == "training step"]
    assert len({step["traceId"] for step in steps}) == 1
    assert {step["attributes"]["tandem.job"] for step in steps} == {job.id}
    assert [step["attributes"]["tandem.step"] for step in steps][:3] == [1, 2, 3]
    quanta = [span for span in collector.spans if span["name"] == "training quantum"]
    for step in steps[:3]:
        assert children(quanta, step)
    assert len(quanta) == sum(len(children(quanta, step)) for step in steps)


def test_lines_of_a_batch_are_one_trace(tmp_path, collector):
    server = Process(tmp_path, "serve", "--port", "0", "--otlp-traces-endpoint", collector.url)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    body = {"model": model, "prompt": "Once", "max_tokens": 3, "ignore_eos": True}
    bodies = {"a": body, "b": body, "wrong": {**body, "max_tokens": -1}}
    asked = [{"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} for name, body in bodies.items()]
    text = "\n".join(map(json.dumps, asked)).encode()
    file = client.files.create(file=("lines.jsonl", text), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    for _ in range(300):
        batch = client.batches.retrieve(batch.id)
        if batch.status == "completed":
            break
        time.sleep(0.1)
    server.end()
    lines = [span for span in collector.spans if span["name"] == "batch line"]
    assert {line["attributes"]["tandem.batch"] for line in lines} == {batch.id}
    assert len({line["traceId"] for line in lines}) == 1
    spans = collector.of(lines[0]["traceId"])
    said = {line["attributes"]["tandem.custom_id"]: line for line in lines}
    assert set(said) == set(bodies)
    for name, status in (("a", 200), ("b", 200), ("wrong", 400)):
        assert said[name]["attributes"]["http.response.status_code"] == status
        calls = children(spans, said[name])
        assert [call["name"] for call in calls] == ["llm_request"] * (status == 200)
        for call in calls:
            assert [stage["name"] for stage in children(spans, call)].count("decode") == 1


def test_calls_of_a_training_client_are_traced_to_their_quanta(tmp_path, collector, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-none")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    server = Process(tmp_path, "serve", "--port", "0", "--otlp-traces-endpoint", collector.url)
    service = tinker.ServiceClient(base_url=server.url)
    base = service.get_server_capabilities().supported_models[0].model_name
    model = service.create_lora_training_client(base, rank=4, train_unembed=False).result()
    row = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0] * 3}
    )
    model.forward_backward([row], "cross_entropy").result()
    model.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    server.end()
    calls = [span for span in collector.spans if span["name"] == "learner call"]
    assert [call["attributes"]["tandem.call"] for call in calls] == ["forward_backward", "optim_step"]
    assert len({call["attributes"]["tandem.model"] for call in calls}) == 1
    for call, route in zip(calls, ("forward_backward", "optim_step")):
        spans = collector.of(call["traceId"])
        [request] = [span for span in spans if span["spanId"] == call["parentSpanId"]]
        assert request["name"] == f"POST /api/v1/{route}"
        quanta = [span["name"] for span in children(spans, call)]
        assert quanta == [] if route == "optim_step" else set(quanta) == {"training quantum"}


def test_a_collector_that_is_away_costs_nothing(tmp_path):
    away = Collector()
    away.server.shutdown()
    away.server.server_close()
    server = Process(tmp_path, "serve", "--port", "0", "--otlp-traces-endpoint", away.url)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    model = client.models.list().data[0].id
    for _ in range(30):
        assert client.completions.create(model=model, prompt="Once", max_tokens=2).choices
        time.sleep(0.1)
    server.end()
    assert server.log.read_text().count("--otlp-traces-endpoint) does not take them") == 1
