"""The client of 2023, the last with /v1/fine-tunes."""

import openai
import pytest


@pytest.fixture(scope="module", autouse=True)
def api(server):
    openai.api_base = server + "/v1"
    openai.api_key = "x"


@pytest.fixture(scope="module")
def model():
    return openai.Model.list()["data"][0]["id"]


def test_completion(model):
    completion = openai.Completion.create(model=model, prompt="Once upon a time", max_tokens=4, logprobs=1)
    assert len(completion["choices"][0]["logprobs"]["tokens"]) == completion["usage"]["completion_tokens"]
    chunks = openai.Completion.create(model=model, prompt="Once upon a time", max_tokens=4, stream=True)
    assert list(chunks)[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_fine_tune(model, training_file):
    file = openai.File.create(file=training_file.open("rb"), purpose="fine-tune", user_provided_filename=training_file.name)
    assert openai.File.retrieve(file["id"])["status"] == "processed"
    tune = openai.FineTune.create(training_file=file["id"], model=model, n_epochs=1, suffix="old", lora_r=4)
    assert tune["object"] == "fine-tune" and tune["training_files"][0]["id"] == file["id"]
    events = list(openai.FineTune.stream_events(tune["id"]))
    assert events and all(event["object"] == "fine-tune-event" for event in events)
    tune = openai.FineTune.retrieve(tune["id"])
    assert tune["status"] == "succeeded", [event["message"] for event in tune["events"]]
    assert tune["id"] in [one["id"] for one in openai.FineTune.list()["data"]]
    assert openai.FineTune.list_events(tune["id"])["data"][0]["object"] == "fine-tune-event"
    assert tune["hyperparams"]["n_epochs"] == 1 and tune["result_files"]

    tuned = tune["fine_tuned_model"]
    assert openai.Completion.create(model=tuned, prompt="Question 1: ", max_tokens=2)["model"] == tuned
    # The client percent-encodes the colons.
    assert openai.Model.delete(tuned)["deleted"]
    # What is left of it: nothing, and that is no error.
    assert openai.FineTune.delete(tune["id"])["deleted"]
    with pytest.raises(openai.error.InvalidRequestError):
        openai.Completion.create(model=tuned, prompt="x")


def test_errors(model):
    with pytest.raises(openai.error.InvalidRequestError) as raised:
        openai.Completion.create(model=model, prompt="x", temperature=3)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.error.InvalidRequestError):
        openai.FineTune.retrieve("ft-unknown")
    with pytest.raises(openai.error.InvalidRequestError):
        openai.FineTune.create(training_file="file-unknown", model=model)
