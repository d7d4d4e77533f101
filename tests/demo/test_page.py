"""The page in a browser: it runs with --demo, where gradio, playwright and Chromium are there."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
REFUSED = ("Failed to load resource", "Response")  # what gradio's script says of an upload that is too large
FAKE = """
import sys, time
sys.path.insert(0, {root!r})
from lmm_jax.demo.page import serve
from tests.demo.asked import Asked
class Slow(Asked):
    def stream(self, images, prompt, **options):
        if prompt == "options?":
            self.pieces = [str(options)]
        for piece in super().stream(images, prompt, **options):
            time.sleep({pause})
            yield piece
serve(Slow({config!r}, pieces={pieces!r}), "a model", port={port}, max_upload=1)
"""


@contextlib.contextmanager
def served(port, config="configs/digits.py", pieces=("six ", "and ", "<b>two</b>"), pause=0.2):
    """A page of a model that answers from a list, in a process of its own: its address."""
    code = FAKE.format(root=str(ROOT), port=port, config=config, pieces=pieces, pause=pause)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        assert line.endswith(f"can be asked at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n")
        yield f"http://127.0.0.1:{port}/"
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and "the page is closed" in process.stdout.read()
        assert time.monotonic() - begin < 15
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    with served(17861) as address:
        yield address


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def opened(browser, address, width=1400):
    """A tab with the page; afterwards, nothing was asked of other places, and no script of it has failed."""
    page = browser.new_page(viewport={"width": width, "height": 1000})
    elsewhere, errors = [], []
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else 0)
    page.on("pageerror", lambda e: errors.append(e))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else 0)
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    assert not elsewhere
    assert [e for e in errors if not str(e).startswith(REFUSED)] == []


def picture(tmp_path, name="picture.png", size=(60, 36)):
    path = tmp_path / name
    Image.new("RGB", size, "teal").save(path)
    return path


def upload(page, path):
    page.set_input_files("#picture input[type=file]", path)


def ask(page, question):
    page.fill("#question textarea", question)
    page.click("#ask button, button#ask")


def wait_for_answers(page, count):
    page.wait_for_function(f"document.querySelectorAll('#answers .card.done').length == {count}", timeout=20_000)


def test_upload_ask_and_move_the_slider(page, tmp_path):
    upload(page, picture(tmp_path))
    page.wait_for_selector("#drawings svg")
    assert "36 positions" in page.inner_text("#drawings")
    ask(page, "what is this?")
    page.wait_for_selector("#answers .card.writing .cursor")
    page.wait_for_function("document.querySelector('#answers .card .said').innerText.trim() == 'six'")  # as it comes
    wait_for_answers(page, 4)
    said = page.locator("#answers .said").all_inner_texts()
    assert [text.strip() for text in said] == ["six and <b>two</b>"] * 4
    assert page.locator("#answers h3").all_inner_texts()[1].startswith("4 visual tokens")
    for text in page.locator("#answers dd").all_inner_texts():
        assert 0.1 < float(re.fullmatch(r"([\d.]+) s", text)[1]) < 5
    slider = page.locator("#budget input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    page.wait_for_selector("#drawings [data-tokens='9']")
    page.wait_for_function("document.querySelector('#ticks .on').innerText == '9'")
    for box in page.locator("#compared input").all():
        box.uncheck()
    ask(page, "and now?")
    wait_for_answers(page, 1)
    assert page.inner_text("#answers h3").startswith("9 visual tokens")


def test_a_broken_upload_gets_a_sentence(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    upload(page, tmp_path / "broken.png")
    page.wait_for_selector("#drawings .refusal")
    assert "cannot read a picture from broken.png" in page.inner_text("#drawings")
    ask(page, "what is this?")
    page.wait_for_selector("#answers .refusal")
    assert "Traceback" not in page.inner_text("body")


def test_an_upload_of_more_than_is_allowed_is_refused(page, tmp_path):
    assert "up to 1 MB" in page.inner_text("#picture")
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    upload(page, tmp_path / "large.png")
    page.wait_for_selector("text=/exceed the maximum allowed size of 1.0 MB/i")
    assert page.locator("#drawings svg, #drawings .refusal").count() == 0


def test_two_visitors_are_answered_at_the_same_time(browser, address, tmp_path):
    with opened(browser, address) as one, opened(browser, address) as two:
        for page in (one, two):
            upload(page, picture(tmp_path))
            page.wait_for_selector("#drawings svg")
        for page, question in ((one, "first?"), (two, "second?")):
            ask(page, question)
        two.wait_for_selector("#answers .card.writing")
        assert one.locator("#answers .card.writing").count() == 1  # neither waits for the other
        for page in (one, two):
            wait_for_answers(page, 4)


def test_stop_ends_an_answer(browser, tmp_path):
    with served(17862, pieces=["word "] * 500, pause=0.05) as address, opened(browser, address) as page:
        upload(page, picture(tmp_path))
        ask(page, "say much")
        page.wait_for_function("document.querySelector('#answers .said')?.innerText.length > 20")
        page.click("#stop button, button#stop")
        page.wait_for_selector("#answers .card.stopped")
        left = page.inner_text("#answers")
        time.sleep(1)
        assert page.inner_text("#answers") == left and left.count("not asked") == 3


def test_ctrl_c_ends_the_page_while_it_answers(browser):
    with served(17864, pieces=["word "] * 2000, pause=0.05) as address:
        page = browser.new_page()
        page.goto(address)
        ask(page, "say much")
        page.wait_for_function("document.querySelector('#answers .said')?.innerText.length > 20")
    page.close()


def test_an_example_is_asked_with_options(browser, digits_folder):
    with served(17865, config=f"configs/digits.py:data={digits_folder}") as address, opened(browser, address) as page:
        page.locator("button.gallery-item").first.click()
        page.wait_for_selector("#drawings svg")
        assert page.input_value("#question textarea")
        page.click("text=Options")
        ask(page, "options?")
        wait_for_answers(page, 4)
        assert "'max_new_tokens': None, 'temperature': 0.0, 'seed': 0}" in page.inner_text("#answers")
        page.fill("input[aria-label='Most new tokens']", "7")
        page.fill("input[aria-label='Seed']", "5")
        ask(page, "options?")
        page.wait_for_function("document.querySelector('#answers').innerText.includes(\"'seed': 5\")")
        wait_for_answers(page, 4)
        assert "{'scale': 36, 'max_new_tokens': 7, 'temperature': 0.0, 'seed': 5}" in page.inner_text("#answers")


@pytest.mark.parametrize("width", [1400, 800, 400])
def test_nothing_sticks_out_of_the_window(browser, tmp_path, width):
    with (
        served(17863, config="configs/digits.py:recipe=deepstack") as address,
        opened(browser, address, width) as page,
    ):
        upload(page, picture(tmp_path))
        page.wait_for_selector("#drawings svg")
        assert page.locator("#drawings svg").count() == 2 and page.locator("#map .added").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_port_that_is_taken_is_refused(address):
    from lmm_jax.demo.page import check_address

    for host, port in (("127.0.0.1", 17861), ("192.0.2.1", None), ("::1", None), ("127.0.0.1", 70_000)):
        with pytest.raises(OSError, match=f"the page cannot be shown at {host}"):
            check_address(host, port)
