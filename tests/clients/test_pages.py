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
    """The page to chat and fine-tune, with the key, and nothing kept of conversations before."""
    tab.open(url + "/")
    tab.run("localStorage.clear()")
    if not tab.run("document.getElementById('key').value"):
        tab.fill("key", KEY)
    tab.open(url + "/")
    tab.wait("document.getElementById('model').options.length > 0")
    return tab


def go(page, place):
    page.run(f"location.hash = '{place}'")
    page.wait(f"!document.getElementById('at-{place}').hidden")


def ask(page, text):
    """Says it, and waits for what comes."""
    page.fill("prompt", text)
    page.click("send")
    page.wait("document.getElementById('stop').hidden")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


def call(url, path, body=None, form=None):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": form or "application/json"}
    data = body if form else body and json.dumps(body).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(url + path, data, headers)))


def test_both_pages_ask_for_the_key(tab, url):
    tab.open(url + "/")
    tab.wait("!document.getElementById('asked').hidden && document.getElementById('key').classList.contains('wanted')")
    tab.fill("key", "wrong")
    tab.wait("!document.getElementById('asked').hidden && !document.getElementById('model').options.length")
    tab.fill("key", KEY)
    tab.wait("document.getElementById('asked').hidden && document.getElementById('model').options.length > 0")
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
    page.run("document.getElementById('model').append(new Option('nobody', 'nobody'))")
    page.fill("tokens", "8")
    page.run("document.getElementById('model').value = 'nobody'")
    ask(page, "Hello!")
    assert "nobody" in page.run("document.getElementById('talk-error').textContent")
    # Nothing was said; the text waits for another try.
    assert texts(page, ".turn") == [] and page.run("document.getElementById('prompt').value") == "Hello!"
    page.run("document.getElementById('model').selectedIndex = 0")
    page.click("send")
    page.wait("document.getElementById('stop').hidden && document.querySelectorAll('.turn.assistant small').length === 1")
    ask(page, "And you?")
    assert texts(page, ".turn.user .text") == ["Hello!", "And you?"]
    assert page.run("document.getElementById('talk-error').hidden")


def test_turns_are_taken_back_and_conversations_kept(page, url):
    page.fill("tokens", "12")
    page.fill("temperature", "0")
    ask(page, "Who is the baker?")
    first = texts(page, ".turn.assistant .text")
    ask(page, "And the miller?")
    page.click("again")
    page.wait("document.getElementById('stop').hidden && document.querySelectorAll('.turn.assistant small').length === 2")
    assert texts(page, ".turn.user .text") == ["Who is the baker?", "And the miller?"]
    # Back to the first turn: what came after it goes, and its text can be written anew.
    page.run("document.querySelector('.turn.user button').click()")
    assert page.run("document.getElementById('prompt').value") == "Who is the baker?" and texts(page, ".turn") == []
    page.click("send")
    page.wait("document.getElementById('stop').hidden && document.querySelectorAll('.turn.assistant small').length === 1")
    assert texts(page, ".turn.assistant .text") == first
    page.click("new")
    assert texts(page, ".turn") == []
    page.open(url + "/")
    page.wait("document.querySelectorAll('#history .name').length === 1")
    page.run("document.querySelector('#history .name').click()")
    assert texts(page, ".turn.assistant .text") == first
    page.run("document.querySelector('#history button:last-child').click()")
    assert texts(page, "#history .name") == [] and texts(page, ".turn") == []


def test_markdown_is_shown_and_nothing_in_it_runs(page):
    source = (
        "# Title\n\ntext with **bold**, *soft*, `code <b>`, [a link](https://example.org/x) and [a trap](javascript:alert(1))\n\n"
        "- one\n  - inner\n- two\n\n3. three\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = 1 < 2\n```\n"
        "<img src=x onerror=\"window.ran = true\">\n\nan open `tick and **star")
    page.run(f"import('./ui/markdown.js').then(({{markdown}}) => document.getElementById('lane-model').replaceChildren(markdown({json.dumps(source)})))")
    html = page.run("document.getElementById('lane-model').innerHTML")
    for part in ["<h3>Title</h3>", "<strong>bold</strong>", "<em>soft</em>", "<code>code &lt;b&gt;</code>", 'href="https://example.org/x"',
                 "[a trap](javascript:alert(1))", "<li>one<ul><li>inner</li></ul></li><li>two</li>", '<ol start="3"><li>three</li></ol>',
                 "<blockquote><p>quoted</p></blockquote>", "<td>1</td><td>2</td>", '<pre><code class="py">x = 1 &lt; 2</code></pre>',
                 "&lt;img src=x", "an open `tick and **star"]:
        assert part in html, f"{part}\n{html}"
    assert not page.run("window.ran") and "<img" not in html


def teach(page, tmp_path, name, rows, **settings):
    file = tmp_path / f"{name}.jsonl"
    file.write_text(rows)
    go(page, "tune")
    page.choose_file("file-training", file)
    page.wait(f"document.querySelector('#drop-training .name').textContent.includes('{name}.jsonl')")
    for field, value in settings.items():
        page.fill(field, value)
    page.click("train")


def test_a_job_from_file_to_answer(page, url, tmp_path):
    teach(page, tmp_path, "good", '{"prompt": "Question: ", "completion": " blue."}\n' * 8, suffix="good", epochs="2", batch="1")
    page.wait("document.getElementById('said').textContent.includes('the job is ftjob-')")
    page.wait("document.getElementById('news').textContent.includes('successfully completed')")
    assert page.run("document.getElementById('numbers').textContent").startswith("step 16 of 16")
    # A bad file: each wrong line is named before anything is sent, and what the server says stays beside the older success.
    teach(page, tmp_path, "bad", '{"prompt": "a", "completion": "b"}\n{oops\n')
    about = page.run("document.getElementById('about-training').textContent")
    assert about.startswith("Line 2: ") and page.run("document.getElementById('about-training').classList.contains('error')")
    page.wait("document.getElementById('said').classList.contains('error')")
    error = page.run("document.getElementById('said').textContent")
    assert "line 2" in error.lower()
    # As its clock does, twice.
    page.run("import('./ui/jobs.js').then(jobs => jobs.look().then(jobs.look))")
    assert page.run("document.getElementById('said').textContent") == error
    assert page.run("document.getElementById('news').textContent.includes('successfully completed')")
    # The result is one press away from an answer.
    page.run("document.querySelector('#checkpoints button').click()")
    page.wait("!document.getElementById('at-talk').hidden")
    tuned = page.run("document.getElementById('model').value")
    assert ":good:" in tuned
    # And beside the base.
    page.click("compare")
    page.fill("tokens", "6")
    ask(page, "Question: ")
    assert texts(page, "#lane-model .turn.assistant > b") == [tuned]
    assert texts(page, "#lane-model2 .turn.assistant > b") == [page.run("document.getElementById('model2').value")] != [tuned]
    # Its folder comes out, and it goes at the second press.
    go(page, "adapters")
    page.wait("document.querySelectorAll('#adapters tr').length === 1")
    assert tuned in texts(page, "#adapters td code")
    page.run("document.querySelector('#adapters button:last-child').click()")
    assert "sure?" in page.run("document.querySelector('#adapters button:last-child').textContent")
    page.run("document.querySelector('#adapters button:last-child').click()")
    page.wait("document.querySelectorAll('#adapters tr').length === 0")
    assert tuned not in [model["id"] for model in call(url, "/v1/models")["data"]]


def test_a_dropped_file_is_taken(page):
    go(page, "tune")
    drop = """(() => {
        const data = new DataTransfer();
        data.items.add(new File(['{"text": "a"}\\n{"text": "b"}\\n'], 'rows.jsonl'));
        document.getElementById('drop-validation').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
    })()"""
    page.run(drop)
    page.wait("document.getElementById('about-validation').textContent === '2 rows'")
    assert "rows.jsonl" in page.run("document.querySelector('#drop-validation .name').textContent")


def test_what_would_be_learned_is_marked(page, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]}\n' * 2)
    go(page, "tune")
    page.choose_file("file-training", file)
    page.wait("document.getElementById('about-training').textContent === '2 rows'")
    page.click("look")
    page.wait("document.querySelectorAll('#preview pre').length === 2")
    learned = texts(page, "#preview pre:first-child mark")
    assert len(learned) == 1 and learned[0].startswith("Nobody.") and "Who?" not in learned[0]
    assert "Who?" in texts(page, "#preview pre")[0] and "2 rows" in page.run("document.getElementById('said').textContent")


def test_a_job_rests_and_goes_on(page, url, tmp_path):
    teach(page, tmp_path, "long", '{"prompt": "Question: ", "completion": " blue."}\n' * 40, suffix="long", epochs="200", batch="1")
    press = "[...document.querySelectorAll('.job.picked button')].find(button => button.textContent === '%s')"
    status = "document.querySelector('.job.picked .status')?.textContent === '%s'"
    page.wait(status % "running")
    page.run(press % "Pause" + ".click()")
    page.wait(status % "paused")
    page.run(press % "Resume" + ".click()")
    page.wait(status % "running")
    page.run(press % "Cancel" + ".click()")
    page.run(press % "Cancel: sure?" + ".click()")
    page.wait(status % "cancelled")


def test_every_setting_of_a_job_is_in_the_form(page, url):
    go(page, "tune")
    page.run("document.getElementById('more').open = true")
    page.wait("document.getElementById('settings').children.length > 10")
    names = set(page.run("[...document.querySelectorAll('#settings [data-name]')].map(input => input.dataset.name)"))
    properties = call(url, "/openapi.json")["components"]["schemas"]["TrainingSettings"]["properties"]
    shown = {"n_epochs", "batch_size", "learning_rate", "lora_r", "max_seq_length", "max_steps"}
    assert names == set(properties) - shown


def test_a_setting_of_the_form_is_the_jobs(page, url, tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "Question: ", "completion": " blue."}\n' * 4)
    go(page, "tune")
    page.run("document.getElementById('more').open = true")
    page.wait("document.getElementById('settings').children.length > 10")
    page.choose_file("file-training", file)
    given = {"lora_alpha": "4", "lora_target_modules": '["q_proj", "v_proj"]', "use_rslora": "true", "lr_scheduler_type": "cosine",
             "max_grad_norm": "0.5", "seed": "11"}
    for name, value in given.items():
        page.run(f"document.querySelector('#settings [data-name={name}]').value = {json.dumps(value)}")
        assert page.run(f"document.querySelector('#settings [data-name={name}]').value") == value, "it can be said"
    for field, value in {"suffix": "set", "epochs": "1", "batch": "4"}.items():
        page.fill(field, value)
    page.click("train")
    page.wait("document.getElementById('said').textContent.includes('the job is ftjob-')")
    job = page.run("document.getElementById('said').textContent.match(/ftjob-[A-Za-z0-9_-]+/)[0]")
    made = call(url, f"/v1/fine_tuning/jobs/{job}")
    chosen = {**made["hyperparameters"], "seed": made["seed"]}
    assert {name: chosen[name] for name in given} == {name: value if name == "lr_scheduler_type" else json.loads(value)
                                                      for name, value in given.items()}


def test_the_curve_begins_at_the_first_step_and_ended_jobs_rest(page, url):
    boundary = "b"
    rows = '{"prompt": "Question: ", "completion": " blue."}\n' * 30
    form = "".join(f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'
                   for name, more, value in [("purpose", "", "fine-tune"), ("file", '; filename="x.jsonl"', rows)])
    file = call(url, "/v1/files", (form + f"--{boundary}--\r\n").encode(), f"multipart/form-data; boundary={boundary}")["id"]
    model = call(url, "/v1/models")["data"][0]["id"]
    job = call(url, "/v1/fine_tuning/jobs", {
        "model": model, "training_file": file, "hyperparameters": {"n_epochs": 50, "batch_size": 1}, "max_steps": 1100, "lora_r": 1,
        "lora_target_modules": ["q_proj"], "max_seq_length": 32, "packing": False})["id"]
    go(page, "tune")
    page.run(f"import('./ui/jobs.js').then(jobs => jobs.pick('{job}'))")
    page.wait("document.querySelector('.job.picked .status')?.textContent === 'succeeded'")
    log = f"import('./ui/jobs.js').then(jobs => jobs.look().then(() => jobs.logOf('{job}')))"
    steps = page.run(f"{log}.then(log => log.points.filter(point => point.train_loss).map(point => point.step))")
    assert steps[0] == 1 and len(steps) > 1000 and steps == sorted(set(steps)), (steps[:3], len(steps))
    # However many, a pixel holds at most four, and nothing sticks out less.
    line = [[step / 10, (step * 7919) % 1000] for step in steps]
    thin = page.run(f"import('./ui/chart.js').then(chart => chart.thinned({json.dumps(line)}))")
    assert len(thin) <= 4 * 112 < len(line) and max(thin, key=lambda at: at[1])[1] == max(line, key=lambda at: at[1])[1]
    # What is known is not asked again.
    page.run("performance.clearResourceTimings()")
    page.run("import('./ui/jobs.js').then(jobs => jobs.look())")
    assert page.run("performance.getEntriesByType('resource').filter(entry => entry.name.includes('/events')).length") == 0


def test_the_server_shows_what_it_does(page):
    go(page, "server")
    page.wait("document.querySelectorAll('.tile').length > 8 && document.getElementById('version').textContent.startsWith('Tandem ')")
    assert page.run("[...document.querySelectorAll('#parts li')].every(part => part.className === 'ok')")
    tile = dict(page.run("[...document.querySelectorAll('.tile')].map(tile => [tile.querySelector('small').textContent, tile.querySelector('b').textContent])"))
    assert tile["Time to first token: half, 99 %"] != "none yet, none yet", tile


def test_no_place_scrolls_sideways_on_a_phone(page):
    page.tell("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        for place in ["talk", "tune", "adapters", "server"]:
            go(page, place)
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), place
    finally:
        page.tell("Emulation.clearDeviceMetricsOverride")
