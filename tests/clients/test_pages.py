"""The two pages, in a real browser, on a server that wants a key."""

import json
import os
import urllib.request

import pytest

import browser as chromium
from conftest import Process

KEY = "sekret"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("tandem"), "serve", "--port", "0", "--api-key", KEY)
    yield process.url
    process.end()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if not chromium.find():
        assert os.environ.get("TEST_SERVICES") != "required", "no chromium: apt-get install chromium"
        pytest.skip("no chromium")
    browser = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.end()


@pytest.fixture
def page(tab, url):
    """The page to chat and fine-tune, with the key."""
    tab.open(url + "/")
    if not tab.run("$('key').value"):
        tab.fill("key", KEY)
    tab.wait("base && base.id")
    return tab


def call(url, path, body=None, form=None):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": form or "application/json"}
    data = body if form else body and json.dumps(body).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(url + path, data, headers)))


def test_both_pages_ask_for_the_key(tab, url):
    tab.open(url + "/")
    tab.wait("!$('asked').hidden && $('key').classList.contains('wanted')")
    tab.fill("key", "wrong")
    tab.wait("!$('asked').hidden && !base")
    tab.fill("key", KEY)
    tab.wait("$('asked').hidden && base && $('model').options.length > 0")
    # The other page has it from the same tab.
    tab.open(url + "/docs")
    tab.wait("document.querySelectorAll('#routes details').length > 20")
    tab.run("sessionStorage.clear()")
    tab.open(url + "/docs")
    tab.wait("!document.getElementById('asked').hidden")


def test_what_try_it_begins_with_is_valid(page, url):
    page.open(url + "/docs")
    page.wait("document.querySelectorAll('#routes details').length > 20")
    send = """(async () => {
        const route = [...document.querySelectorAll('#routes > details')].find(one =>
            one.querySelector('summary b').textContent === 'POST' && one.querySelector('summary code').textContent === %s);
        route.open = true;
        await new Promise(resolve => setTimeout(resolve));
        route.querySelector('.inside > button').click();
        return 'pressed';
    })()"""
    shown = """[...document.querySelectorAll('#routes > details')].find(one =>
        one.querySelector('summary b').textContent === 'POST' && one.querySelector('summary code').textContent === %s)
        .querySelector('.inside > pre').textContent"""
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]:
        page.run(send % json.dumps(path))
        page.wait(f"({shown % json.dumps(path)}).split('\\n').length > 2")
        answer = page.run(shown % json.dumps(path))
        assert answer.startswith("200\n"), f"{path}: {answer}"


def test_a_failed_turn_is_not_sent_again(page):
    page.run("$('model').append(new Option('nobody', 'nobody'))")
    page.fill("tokens", "8")
    page.run("$('model').value = 'nobody'")
    page.fill("prompt", "Hello!")
    page.click("send")
    page.wait("document.querySelector('.turn.error')")
    assert "nobody" in page.run("document.querySelector('.turn.error').innerText")
    # Nothing was said; the text waits for another try.
    assert page.run("messages.length === 0 && $('prompt').value === 'Hello!'")
    page.run("$('model').value = base.id")
    page.click("send")
    page.wait("messages.length === 2 && !reading")
    assert page.run("messages.map(message => message.role)") == ["user", "assistant"]
    page.fill("prompt", "And you?")
    page.click("send")
    page.wait("messages.length === 4 && !reading")
    assert page.run("document.querySelectorAll('.turn.error').length") == 1


def test_an_error_stays_beside_an_older_success(page, url, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "Question: ", "completion": " blue."}\n' * 4)
    page.choose_file("file", good)
    page.fill("suffix", "good")
    page.fill("epochs", "1")
    page.click("train")
    page.wait("$('said').textContent.includes('the job is ftjob-')")
    page.wait("$('news').textContent.includes('successfully completed')")
    page.wait("$('model').selectedOptions[0].value.includes(':good:')")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n")
    page.choose_file("file", bad)
    page.click("train")
    page.wait("$('said').className === 'error'")
    error = page.run("$('said').textContent")
    # As its clock does, twice.
    page.run("look().then(look)")
    assert page.run("$('said').textContent") == error and "line 1" in error.lower()
    assert page.run("$('news').textContent.includes('successfully completed')")


def test_the_curve_begins_at_the_first_step(page, url):
    boundary = "b"
    rows = '{"prompt": "Question: ", "completion": " blue."}\n' * 30
    form = "".join(f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'
                   for name, more, value in [("purpose", "", "fine-tune"), ("file", '; filename="x.jsonl"', rows)])
    file = call(url, "/v1/files", (form + f"--{boundary}--\r\n").encode(), f"multipart/form-data; boundary={boundary}")["id"]
    model = call(url, "/v1/models")["data"][0]["id"]
    job = call(url, "/v1/fine_tuning/jobs", {
        "model": model, "training_file": file, "hyperparameters": {"n_epochs": 50, "batch_size": 1}, "max_steps": 1100, "lora_r": 1,
        "lora_target_modules": ["q_proj"], "max_seq_length": 32, "packing": False})["id"]
    page.run(f"pick('{job}')")
    page.wait(f"logOf('{job}').done")
    steps = page.run(f"logOf('{job}').points.filter(point => point.train_loss).map(point => point.step)")
    assert steps[0] == 1 and len(steps) > 1000 and steps == sorted(set(steps)), (steps[:3], len(steps))
    # What is known is not asked again.
    page.run("performance.clearResourceTimings()")
    page.run("look()")
    assert page.run("performance.getEntriesByType('resource').filter(entry => entry.name.includes('/events')).length") == 0
