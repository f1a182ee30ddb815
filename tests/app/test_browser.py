"""The app in a headless Chromium: each tab does its work for a model of each family, by mouse and by keyboard."""

import re
import shutil
import socket

import pytest


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install playwright"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt install chromium"),
]

STARTS = {"Generate": "Generate", "Walk": "Walk", "Edit": "Edit", "Look inside": "Show", "Compare": "Compare"}
TABS = {
    "diffusion": ["Generate", "Walk", "Edit", "Look inside", "Compare", "About"],
    "conditional": ["Generate", "Walk", "Edit", "Look inside", "Compare", "About"],
    "pixelcnn": ["Generate", "Edit", "Compare", "About"],
    "vae": ["Generate", "Walk", "Edit", "Compare", "About"],
    "dcgan": ["Generate", "Walk", "Compare", "About"],
}
SECONDS = 60_000  # milliseconds that a busy machine may take


@pytest.fixture(scope="module")
def url(models):
    from tiny_diffusers.app.server import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch(models, port=port, device="cpu", block=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """Opens the app; afterwards the console must hold no error, and no request have left for another server."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(SECONDS)
    faults = []
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: re.match(f"{url}|data:|blob:", request.url) or faults.append(request.url))
    page.goto(url)
    page.get_by_role("tab", name="Generate").wait_for()
    yield page
    page.close()
    assert faults == []


def choose_model(page, name):
    page.get_by_label("Model", exact=True).first.click()
    page.get_by_role("option").filter(has_text=f"{name} (").first.click()
    page.wait_for_load_state("networkidle")


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


@pytest.mark.parametrize("name", TABS)
def test_each_tab_does_its_work(page, name):
    choose_model(page, name)
    playwright.expect(page.get_by_role("tab").filter(visible=True)).to_have_text(TABS[name])
    for tab in TABS[name]:
        panel = open_tab(page, tab)
        if tab == "About":
            playwright.expect(panel).to_contain_text(name)
            continue
        panel.get_by_role("button", name=STARTS[tab], exact=True).click()
        panel.locator("img[src*='.png']").first.wait_for()
        playwright.expect(page.get_by_text("Error", exact=True)).to_have_count(0)


def test_a_mistake_is_told_in_the_page(page):
    panel = open_tab(page, "Edit")
    panel.get_by_label("Inpaint").check()
    panel.get_by_label("Hidden part").click()
    page.get_by_role("option", name="painted in red").click()
    panel.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("Nothing is painted in red").wait_for()


def test_stop_ends_a_request(page):
    panel = open_tab(page, "Generate")
    panel.get_by_label("number input for Number of images").fill("64")
    steps = panel.get_by_label("number input for Steps")
    steps.fill("250")
    steps.press("Tab")
    panel.get_by_role("button", name="Generate", exact=True).click()
    panel.get_by_text("Drawing: step").wait_for()
    panel.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped.").wait_for()


def test_the_keyboard_is_enough(page):
    panel = open_tab(page, "Generate")
    panel.get_by_role("button", name="Generate", exact=True).focus()
    page.keyboard.press("Enter")
    panel.get_by_text(re.compile("^16 images in")).wait_for()


def test_a_window_of_400_pixels_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 400, "height": 800})
    for tab in TABS["diffusion"]:
        if not page.get_by_role("tab", name=tab, exact=True).is_visible():  # behind the button of more tabs
            continue
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
