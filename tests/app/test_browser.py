"""The page in a browser: Debian's chromium, driven by Playwright."""

import re
import shutil

import pytest
from PIL import Image

from tiny_diffusers.app.edit import tasks_of
from tiny_diffusers.app.look import views_of
from tiny_diffusers.app.models import list_models
from tiny_diffusers.app.server import launch


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
FAMILIES = ("conditional", "pixelcnn", "vae", "dcgan", "conditions")  # test_tabs.py has the others


@pytest.fixture(scope="module")
def served(checkpoints):
    models = list_models([str(folder) for folder in checkpoints.values()])
    page = launch(models, device="cpu", block=False)
    page.models = {model.name: model for model in models}
    yield page
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(served, browser):
    """Opens the page for a model; at the end no error may stand in the console, and nothing was asked of elsewhere."""
    faults, contexts = [], []

    def note(request):
        if not request.url.startswith((served.local_url, "data:", "blob:")):
            faults.append(request.url)

    def open_for(name, width=1200):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", note)
        page.goto(served.local_url)
        page.get_by_role("tab", name="Generate").wait_for()
        page.get_by_label("Model", exact=True).first.click()
        page.get_by_role("option").filter(has_text=f"{name} (").first.click()
        page.get_by_role("tab", name="About").click()
        page.get_by_role("heading", name=name, exact=True).wait_for()
        page.get_by_role("tab", name="Generate").click()
        return page

    yield open_for
    for context in contexts:
        context.close()
    assert faults == []


def panel_of(page, tab):
    page.get_by_role("tab", name=tab, exact=True).click()
    return page.locator("[role=tabpanel]:visible")


def set_steps(panel):
    steps = panel.get_by_label(re.compile("number input for Steps"))
    if steps.count() and steps.first.is_visible():
        steps.first.fill("3")
        steps.first.press("Tab")


def run(panel, button, number_of_images=None):
    from playwright.sync_api import expect

    set_steps(panel)
    if number_of_images is not None:
        panel.get_by_label(re.compile("number input for Number of images")).fill(str(number_of_images))
    picture = panel.locator(".picture img")
    earlier = picture.get_attribute("src") if picture.count() else None
    panel.get_by_role("button", name=button, exact=True).click()
    picture.wait_for()
    panel.locator(".block.status", has_text=re.compile("loading|step|row")).wait_for(state="detached")
    if earlier is not None:
        expect(picture).not_to_have_attribute("src", earlier, timeout=60_000)
    expect(picture).not_to_have_js_property("naturalWidth", 0, timeout=60_000)


def stop(panel):
    with panel.page.expect_response(lambda response: response.url.endswith("/reset")):  # the last that Stop asks for
        panel.get_by_role("button", name="Stop").click()
    panel.locator(".status", has_text="Stopped.").first.wait_for()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tab_does_its_work(served, open_page, family):
    page, model = open_page(family), served.models[family]
    tabs = [tab.inner_text() for tab in page.get_by_role("tab").all() if tab.is_visible()]
    expected = {"Walk": model.can_walk, "Edit": model.can_edit, "Look inside": bool(views_of(model))}
    assert tabs == ["Generate", *(name for name, is_shown in expected.items() if is_shown), "Compare", "About"]
    run(panel_of(page, "Generate"), "Generate")
    if model.can_walk:
        run(panel_of(page, "Walk"), "Walk")
    if model.can_edit:
        panel = panel_of(page, "Edit")
        panel.get_by_role("button", name="Take a sample of the model").click()
        panel.get_by_label(tasks_of(model)[-1], exact=True).click()
        run(panel, "Edit")
    if views_of(model):
        run(panel_of(page, "Look inside"), "Show")


def test_another_model_opens_the_first_tab_only_where_it_lacks_the_open_one(open_page):
    page = open_page("conditional")
    for tab, model, expected in (("About", "vae", "About"), ("Walk", "pixelcnn", "Generate")):
        page.get_by_role("tab", name=tab, exact=True).click()
        page.get_by_label("Model", exact=True).first.click()
        with page.expect_response(lambda response: response.url.endswith("/run/predict")):
            page.get_by_role("option").filter(has_text=f"{model} (").first.click()
        page.get_by_role("tab", name=expected, exact=True, selected=True).wait_for()


def test_models_are_compared(open_page):
    panel = panel_of(open_page("flow"), "Compare")
    for box in panel.get_by_role("checkbox").all():
        box.set_checked(box.locator("..").inner_text().startswith(("vae (", "flow (")))
    run(panel, "Compare")
    panel.get_by_text("No model has a report").wait_for()


def test_a_wrong_value_is_one_line_in_the_page(open_page):
    panel = panel_of(open_page("flow"), "Generate")
    panel.get_by_label("Seed").fill("-1")
    panel.get_by_role("button", name="Generate", exact=True).click()
    panel.page.get_by_text(re.compile("-1")).first.wait_for()
    panel.get_by_label("Seed").fill("3")
    run(panel, "Generate")


def test_a_request_is_stopped(open_page):
    panel = panel_of(open_page("diffusion"), "Generate")
    for label, value in (("Number of images", "64"), ("Steps", "250")):
        panel.get_by_label(re.compile(f"number input for {label}")).fill(value)
    panel.get_by_role("button", name="Generate", exact=True).click()
    panel.get_by_text("Drawing: step").wait_for()
    stop(panel)
    run(panel, "Generate", number_of_images=2)


def test_a_request_that_waits_is_taken_out_of_the_queue(open_page):
    first, second = (panel_of(open_page(name), "Generate") for name in ("diffusion", "vae"))
    for label, value in (("Number of images", "64"), ("Steps", "250")):
        first.get_by_label(re.compile(f"number input for {label}")).fill(value)
    first.get_by_role("button", name="Generate", exact=True).click()
    first.get_by_text("Drawing: step").wait_for()
    second.get_by_role("button", name="Generate", exact=True).click()
    second.get_by_text(re.compile("queue")).first.wait_for()
    stop(second)
    stop(first)
    run(first, "Generate", number_of_images=2)
    assert second.locator(".picture img").count() == 0


def test_a_picture_is_uploaded_as_a_condition(open_page, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "picture.png")
    panel = panel_of(open_page("enlarging"), "Generate")
    panel.locator("input[type=file]").set_input_files(tmp_path / "picture.png")
    panel.get_by_role("img", name="Picture that is its condition").or_(
        panel.locator(".image-container img")
    ).first.wait_for()
    run(panel, "Generate")


def test_the_keyboard_is_enough(open_page):
    panel = panel_of(open_page("vae"), "Generate")
    panel.get_by_label("Seed").focus()
    panel.page.keyboard.type("5")
    panel.page.keyboard.press("Enter")
    panel.get_by_text("16 images in").wait_for()
    panel.get_by_role("button", name="Generate", exact=True).focus()
    panel.page.keyboard.press("Enter")
    panel.locator(".picture img").wait_for()


def test_a_narrow_window_needs_no_scrolling_to_the_side(open_page):
    page = open_page("conditional", width=1200)
    page.set_viewport_size({"width": 400, "height": 800})
    run(page.locator("[role=tabpanel]:visible"), "Generate")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
