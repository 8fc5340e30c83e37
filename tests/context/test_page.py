"""The web page in a real Chromium: what a person does by hand, with the mouse or the keyboard alone."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aos_context.memory import InMemoryMemoryStore
from aos_context.runs import Runs

from tests.context.served import FACT, Service, a_patch, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Debian's chromium")

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("page") / "runs") as given:
        yield given


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def refusals() -> list[int]:
    """The statuses of refusals that the test means the page to get, in order."""
    return []


@pytest.fixture
def page(browser: Any, service: Service, refusals: list[int]) -> Iterator[Any]:
    with page_of(browser, service, refusals) as opened:
        yield opened


@contextmanager
def page_of(browser: Any, service: Service, refusals: list[int]) -> Iterator[Any]:
    """The page, open. A test fails where its console has an error, it asks another host, or is refused unexpectedly."""
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    api.expect.set_options(timeout=PATIENCE_MS)
    wrong: list[str] = []
    statuses: list[int] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    # Chromium writes a line for each answer with such a status, too: the status says which are meant.
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" and not refused(said) else None)
    opened.on("response", lambda got: statuses.append(got.status) if got.status >= 400 else None)
    opened.on("request", lambda asked: None if asked.url.startswith(service.url) else wrong.append(asked.url))
    opened.goto(service.url)
    api.expect(opened.locator("#service")).to_contain_text("Version")
    yield opened
    context.close()
    assert (wrong, statuses) == ([], refusals)


def refused(said: Any) -> bool:
    """Whether a line of the console tells of an answer that the service gave."""
    return str(said.text).startswith("Failed to load resource: the server responded with a status of ")


def status(page: Any, words: str) -> None:
    api.expect(page.locator("#status")).to_contain_text(words)


def boot(page: Any, objective: str) -> None:
    page.get_by_label("Objective").fill(objective)
    page.get_by_label("Acceptance criteria, one a line").fill("It is all there\n\nThe sums agree")
    page.get_by_role("button", name="Boot", exact=True).click()
    status(page, "was booted")
    api.expect(page.locator("#run-title")).to_have_text(objective)


def run_of(service: Service, objective: str) -> str:
    [run_id] = [one["run_id"] for one in service.get("/runs").json()["runs"] if one["objective"] == objective]
    return str(run_id)


def test_a_run_is_booted_patched_remembered_packed_and_loaded_by_hand(
    page: Any, service: Service, tmp_path: Path
) -> None:
    boot(page, "Move the invoices.")
    run_id = run_of(service, "Move the invoices.")
    assert service.get(f"/runs/{run_id}/ws").json()["acceptance_criteria"] == ["It is all there", "The sums agree"]

    page.locator("#patch-status").select_option("BUSY")
    page.get_by_label("Next action").fill("Count the files")
    page.locator("#patch-content").fill("There are 40 files")
    page.get_by_label("Pinned: never evicted").check()
    page.get_by_role("button", name="Apply", exact=True).click()
    status(page, "the working set is at 1")
    api.expect(page.locator("#ws-pinned")).to_contain_text("There are 40 files")
    api.expect(page.locator("#ws-facts")).to_contain_text("Count the files")

    page.locator("#propose-content").fill("Old invoices are in pounds")
    page.get_by_label("Rationale").fill("Seen in 12 of them")
    page.get_by_role("button", name="Propose", exact=True).click()
    status(page, "It was proposed.")
    page.get_by_label("Search (empty: the newest)").fill("pounds")
    page.get_by_role("button", name="Search", exact=True).click()
    status(page, "0 found.")

    page.get_by_label("Reason").fill("counted")
    page.get_by_role("button", name="Reach the milestone", exact=True).click()
    status(page, "Episode 1 was written. Committed: 1.")
    api.expect(page.locator("#episodes")).to_contain_text("counted")
    page.get_by_role("button", name="Search", exact=True).click()
    status(page, "1 found.")
    api.expect(page.locator("#hits")).to_contain_text("Old invoices are in pounds")

    page.get_by_role("button", name="Show", exact=True).click()
    api.expect(page.locator("#brief-text")).to_contain_text("Move the invoices.")

    page.get_by_role("button", name="Snapshot", exact=True).click()
    status(page, "The run was packed")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "pack.zip")
    assert (tmp_path / "pack.zip").read_bytes()[:2] == b"PK"

    page.get_by_role("button", name="Load", exact=True).click()
    status(page, f"goes on from {run_id}")
    api.expect(page.locator("#ledger")).to_contain_text("RESUME_PACK_LOADED")
    api.expect(page.locator("#runs button")).to_have_count(2)


def test_a_stale_patch_is_told_kindly_and_what_was_typed_stays(
    page: Any, service: Service, refusals: list[int]
) -> None:
    refusals += [409]
    boot(page, "Be patched by two.")
    run_id = run_of(service, "Be patched by two.")
    assert service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(next_action="Another's")}).status == 200
    page.get_by_label("Next action").fill("Mine")
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#patch-stale")).to_contain_text("it was at 0, and is at 1")
    api.expect(page.locator("#ws-facts")).to_contain_text("Another's")
    api.expect(page.get_by_label("Next action")).to_have_value("Mine")
    page.get_by_role("button", name="Apply", exact=True).click()
    status(page, "the working set is at 2")
    api.expect(page.locator("#patch-stale")).to_be_hidden()
    api.expect(page.locator("#ws-facts")).to_contain_text("Mine")


def test_what_is_refused_is_shown_with_its_path_and_a_patch_may_be_json(page: Any, refusals: list[int]) -> None:
    refusals += [422, 422]
    boot(page, "Be refused.")
    page.get_by_text("Or write the patch as JSON").click()
    field = page.get_by_label("Patch, in place of all above")
    field.fill("{")
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("The patch is not JSON")
    field.fill('{"_schema_version": "2.1", "expected_seq": 0, "set": {"status": "ASLEEP"}}')
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("$.patch.set.status")
    api.expect(page.locator("#fault-list li")).to_have_count(0)
    field.fill('{"_schema_version": "2.1", "expected_seq": 0, "set": {"status": "ASLEEP", "next_action": 1}}')
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#fault-list")).to_contain_text("$.patch.set.next_action")
    api.expect(page.locator("#fault-list li")).to_have_count(2)
    field.fill('{"_schema_version": "2.1", "expected_seq": 0, "set": {"status": "WAITING"}}')
    page.get_by_role("button", name="Apply", exact=True).click()
    status(page, "the working set is at 1")
    api.expect(page.locator("#fault")).to_be_hidden()


def test_what_others_wrote_is_text_and_never_html(page: Any, service: Service) -> None:
    run_id = service.boot(HOSTILE, acceptance_criteria=[HOSTILE])
    item = {"id": "c1", "content": HOSTILE, "timestamp": "2026-01-18T00:00:00Z", "priority": 1}
    service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(next_action=HOSTILE, sliding_context=[item])})
    mcrs = [FACT | {"content": HOSTILE, "rationale": HOSTILE}]
    batch_id = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": mcrs, "writer": HOSTILE}).json()["batch_id"]
    service.post(f"/runs/{run_id}/milestone", {"reason": HOSTILE, "memory_batch_id": batch_id})
    page.reload()
    page.locator(f"[data-run='{run_id}']").click()
    status(page, "is open")
    page.get_by_role("button", name="Search", exact=True).click()
    status(page, "found.")
    page.get_by_role("button", name="Show", exact=True).click()
    api.expect(page.locator("#brief-text")).to_be_visible()
    for place in ("#run-title", "#ws-facts", "#ws-sliding", "#hits", "#episodes", "#brief-text"):
        api.expect(page.locator(place)).to_contain_text("<img src=x")
    assert page.locator("img").count() == 0
    assert page.title() == "Context of agents"


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    page.keyboard.press("Tab")
    api.expect(page.get_by_text("Skip to the run")).to_be_focused()
    page.get_by_label("Objective").focus()
    page.keyboard.type("By keyboard.")
    for _ in range(3):
        page.keyboard.press("Tab")
    api.expect(page.get_by_role("button", name="Boot", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    status(page, "was booted")
    api.expect(page.locator("#run")).to_be_focused()


def test_every_field_and_button_has_a_name(page: Any) -> None:
    boot(page, "Be named.")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, pre[tabindex]")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    levels = page.evaluate("() => [...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


class Held:
    """The next request to an address, which waits until it is let go."""

    def __init__(self, page: Any, address: str) -> None:
        self._page, self._address = page, address
        self._routes: list[Any] = []
        page.route(address, self._hold, times=1)

    def _hold(self, route: Any) -> None:
        self._routes.append(route)

    def let_go(self) -> None:
        """The page has its answer once this returns, and has had the turn to act on it."""
        with self._page.expect_response(self._address) as response:
            self._routes.pop().continue_()
        response.value.finished()
        for _ in range(3):  # requests that the page makes of the answer are made before these, and answered
            self._page.evaluate("async () => (await fetch('/runs')).json()")


def choose(page: Any, run_id: str) -> None:
    page.locator(f"[data-run='{run_id}']").click()


def test_the_run_that_was_chosen_last_is_shown_and_not_the_one_that_answers_last(page: Any, service: Service) -> None:
    slow, quick = service.boot("Answer late."), service.boot("Answer at once.")
    page.reload()
    held = Held(page, f"{service.url}/runs/{slow}/ws")
    choose(page, slow)
    choose(page, quick)
    status(page, f"Run {quick} is open.")
    held.let_go()
    api.expect(page.locator("#run-title")).to_have_text("Answer at once.")
    api.expect(page.locator("#status")).to_have_text(f"Run {quick} is open.")
    api.expect(page.locator("[aria-current=true]")).to_have_attribute("data-run", quick)


def test_a_run_that_is_booted_late_does_not_take_the_place_of_one_chosen_meanwhile(page: Any, service: Service) -> None:
    chosen = service.boot("Be chosen meanwhile.")
    page.reload()
    held = Held(page, f"{service.url}/runs/boot")
    page.get_by_label("Objective").fill("Be booted late.")
    page.get_by_role("button", name="Boot", exact=True).click()
    choose(page, chosen)
    status(page, f"Run {chosen} is open.")
    held.let_go()
    status(page, "was booted")
    api.expect(page.locator("#run-title")).to_have_text("Be chosen meanwhile.")
    api.expect(page.locator("#runs")).to_contain_text("Be booted late.")


def test_what_is_answered_for_a_run_that_is_shown_no_more_changes_nothing_of_the_one_that_is(
    page: Any, service: Service
) -> None:
    left, shown = service.boot("Be left."), service.boot("Be shown.")
    page.reload()
    choose(page, left)
    status(page, f"Run {left} is open.")
    held = Held(page, f"{service.url}/runs/{left}/step/update")
    page.get_by_label("Next action").fill("For the run that is left")
    page.get_by_role("button", name="Apply", exact=True).click()
    choose(page, shown)
    status(page, f"Run {shown} is open.")
    page.get_by_label("Next action").fill("Typed for the other")
    held.let_go()
    status(page, f"Run {left}: The patch was applied")
    assert service.get(f"/runs/{left}/ws").json()["next_action"] == "For the run that is left"
    api.expect(page.locator("#ws-facts")).to_contain_text(shown)
    api.expect(page.locator("#patch-seq")).to_have_text("0")
    api.expect(page.get_by_label("Next action")).to_have_value("Typed for the other")
    assert service.get(f"/runs/{shown}/ws").json()["_update_seq"] == 0


def propose(page: Any, content: str) -> None:
    page.locator("#propose-content").fill(content)
    page.get_by_label("Rationale").fill("Seen")
    page.get_by_role("button", name="Propose", exact=True).click()


def reach(page: Any, reason: str) -> None:
    page.get_by_label("Reason").fill(reason)
    page.get_by_role("button", name="Reach the milestone", exact=True).click()


def test_every_batch_that_waits_can_be_chosen_and_each_has_a_milestone_of_its_own(page: Any, service: Service) -> None:
    boot(page, "Remember two things.")
    run_id = run_of(service, "Remember two things.")
    batches = page.locator("#milestone-batch option")
    for number, content in enumerate(("Boxes are blue", "Lids are green"), 2):
        propose(page, content)
        api.expect(batches).to_have_count(number)
    api.expect(page.locator("#waiting")).to_have_text("2 batches wait. A milestone commits one.")
    facts = [FACT | {"content": "Nails are short", "scope": "run"}]
    service.post(f"/runs/{run_id}/memory/propose", {"mcrs": facts, "actor": "another"})

    page.reload()
    choose(page, run_id)
    status(page, "is open")
    api.expect(batches).to_have_count(4)
    api.expect(batches.nth(3)).to_contain_text("Nails are short, by anonymous")
    second = batches.nth(2).get_attribute("value")
    page.get_by_label("Batch of memory").select_option(second)
    reach(page, "lids")
    status(page, "Committed: 1. Batches that still wait for a milestone each: 2.")
    [memory] = service.get(f"/runs/{run_id}/memory/search?q=lids").json()["hits"]
    assert (memory["item"]["content"], memory["item"]["batch_id"]) == ("Lids are green", second)
    api.expect(page.get_by_label("Batch of memory")).to_have_value("")


def test_it_is_said_when_nothing_new_was_proposed_and_what_waits_twice_can_be_committed_by_either(page: Any) -> None:
    boot(page, "Propose twice.")
    propose(page, "Ropes are long")
    status(page, "It was proposed.")
    propose(page, "Ropes are long")
    status(page, "It was proposed.")
    api.expect(page.locator("#proposed")).to_contain_text("It is there already: it waits in batch_")
    api.expect(page.locator("#milestone-batch option")).to_have_count(3)
    reach(page, "known")
    status(page, "Committed: 1.")
    propose(page, "Ropes are long")
    status(page, "Nothing new was proposed")
    api.expect(page.locator("#proposed")).to_contain_text("It is there already: as mem_")


def test_a_batch_can_be_chosen_though_another_run_has_proposed_the_same_and_much_has_happened_since(
    page: Any, service: Service
) -> None:
    other = service.boot("Propose first.")
    service.post(f"/runs/{other}/memory/propose", {"mcrs": [FACT | {"content": "Zebras have stripes"}]})
    boot(page, "Propose the same.")
    propose(page, "Zebras have stripes")
    status(page, "It was proposed. A milestone that names its batch commits it. Another run has proposed it, too.")
    run_id = run_of(service, "Propose the same.")
    for _ in range(205):
        service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(99)})
    page.reload()
    choose(page, run_id)
    status(page, "is open")
    api.expect(page.locator("#waiting")).to_have_text("1 batch waits. A milestone commits one.")
    page.get_by_label("Batch of memory").select_option(index=1)
    reach(page, "seen")
    status(page, "Committed: 1.")
    api.expect(page.locator("#waiting")).to_have_text("No batch of memory waits.")


def test_a_run_that_was_loaded_offers_no_batch_of_the_one_that_was_packed(page: Any, service: Service) -> None:
    run_id = service.boot("Be packed while a batch waits.")
    service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [FACT | {"content": "Cranes are high"}]})
    packed = service.post(f"/runs/{run_id}/resume/snapshot", {}).json()["pack_path"]
    loaded = service.post("/runs/resume/load", {"pack_path": packed}).json()["run_id"]
    page.reload()
    choose(page, run_id)
    api.expect(page.locator("#milestone-batch option")).to_have_count(2)
    choose(page, loaded)
    status(page, f"Run {loaded} is open.")
    api.expect(page.locator("#milestone-batch option")).to_have_count(1)
    reach(page, "goes on")
    status(page, "Episode 1 was written.")


def search(page: Any, words: str) -> None:
    page.get_by_label("Search (empty: the newest)").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()


def test_what_was_found_is_called_a_part_where_it_may_be_and_can_be_changed_and_deleted(
    page: Any, service: Service
) -> None:
    run_id = service.boot("Amend what is remembered.")
    facts = [FACT | {"content": f"Alphabets number {number}", "scope": "run"} for number in range(12)]
    batch = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": facts}).json()["batch_id"]
    service.post(f"/runs/{run_id}/milestone", {"reason": "x", "memory_batch_id": batch})
    page.reload()
    choose(page, run_id)
    status(page, "is open")
    search(page, "alphabets")
    status(page, "The best 10 of what was found.")
    hits, form = page.locator("#hits li"), page.locator("#propose")
    api.expect(hits).to_have_count(10)
    search(page, "alphabets 7")
    api.expect(hits.first).to_contain_text("Alphabets number 7")
    item_id = hits.first.locator("code").inner_text()

    page.get_by_role("button", name=f"Change {item_id}").click()
    api.expect(form.get_by_label("What to do")).to_be_focused()
    api.expect(form.get_by_label("Id of the memory")).to_have_value(item_id)
    api.expect(form.get_by_label("Content")).to_have_value("Alphabets number 7")
    api.expect(form.get_by_label("Scope")).to_be_hidden()
    propose(page, "Alphabets number seven")
    status(page, "It was proposed.")
    api.expect(form.get_by_label("Id of the memory")).to_be_hidden()
    api.expect(page.locator("#milestone-batch option").nth(1)).to_contain_text(
        f"update {item_id}: Alphabets number seven"
    )
    reach(page, "changed")
    status(page, "Committed: 1.")

    form.get_by_label("What to do").select_option("supersede one")
    form.get_by_label("Id of the memory").fill(item_id)
    propose(page, "Alphabets have 26 letters")
    status(page, "It was proposed.")
    reach(page, "superseded")
    status(page, "Committed: 2.")
    search(page, "letters")
    status(page, "1 found.")
    page.get_by_role("button", name="Change").click()
    form.get_by_label("What to do").select_option("delete one")
    api.expect(form.get_by_label("Content")).to_be_hidden()
    form.get_by_label("Rationale").fill("Wrong")
    page.get_by_role("button", name="Propose", exact=True).click()
    status(page, "It was proposed.")
    reach(page, "deleted")
    status(page, "Committed: 1.")
    page.locator("#search-status").select_option("deleted")
    page.get_by_role("button", name="Search", exact=True).click()
    status(page, "1 found.")
    api.expect(hits).to_contain_text("Alphabets have 26 letters")
    api.expect(page.get_by_role("button", name="Change")).to_have_count(0)


def test_a_patch_of_nothing_is_told_so_by_the_page(page: Any) -> None:
    boot(page, "Change nothing.")
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("Nothing is filled in")


TOP = "(selector) => document.querySelector(selector).getBoundingClientRect().top + scrollY"
"""How far an element is from the page's top, in pixels."""


def test_an_error_lies_over_the_page_moves_nothing_and_can_be_closed(page: Any, refusals: list[int]) -> None:
    refusals += [404]
    place = page.evaluate(TOP, "#load")
    page.get_by_label("Path in the folder of runs").fill("nothing.zip")
    page.get_by_role("button", name="Load", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("nothing.zip")
    assert page.evaluate(TOP, "#load") == place
    page.get_by_role("button", name="Close the message").click()
    api.expect(page.locator("#fault")).to_be_hidden()


@pytest.mark.parametrize(("width", "most"), [(1280, 1_300), (360, 3_000)])
def test_a_working_set_of_any_legal_size_leaves_the_forms_in_reach(
    page: Any, service: Service, width: int, most: int
) -> None:
    long = "word " * 400
    run_id = service.boot(long, acceptance_criteria=[long] * 50, constraints=[long] * 50)
    items = [
        {"id": f"c{number}", "content": "word " * 3_000, "timestamp": "2026-01-18T00:00:00Z", "priority": 1}
        for number in range(8)
    ]
    patch = a_patch(next_action=long, sliding_context=items)
    assert service.post(f"/runs/{run_id}/step/update", {"patch": patch}).status == 200
    page.set_viewport_size({"width": width, "height": 800})
    page.reload()
    choose(page, run_id)
    status(page, "is open")
    assert page.evaluate(TOP, "#patch") < most


def test_a_milestone_shows_what_has_become_of_the_other_runs(page: Any, service: Service) -> None:
    other = service.boot("Change meanwhile.")
    boot(page, "Reach a milestone.")
    service.post(f"/runs/{other}/step/update", {"patch": a_patch(status="BLOCKED")})
    reach(page, "reached")
    status(page, "Episode 1 was written.")
    api.expect(page.locator(f"[data-run='{other}']")).to_contain_text("BLOCKED")


def test_a_pack_is_uploaded_and_all_that_the_page_does_is_the_pages_in_the_ledger(
    page: Any, service: Service, tmp_path: Path, refusals: list[int]
) -> None:
    boot(page, "Be uploaded.")
    page.get_by_label("Next action").fill("Pack")
    page.get_by_role("button", name="Apply", exact=True).click()
    status(page, "the working set is at 1")
    propose(page, "Packs are small")
    status(page, "It was proposed.")
    reach(page, "packed")
    status(page, "Committed: 1.")
    page.get_by_role("button", name="Snapshot", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "pack.zip")
    page.get_by_role("button", name="Load", exact=True).click()
    status(page, "goes on from")

    form = page.locator("#upload")
    form.get_by_label("Zipped pack").set_input_files(tmp_path / "pack.zip")
    form.get_by_label("New run id").fill("uploaded")
    form.get_by_role("button", name="Upload", exact=True).click()
    status(page, "Run uploaded goes on from")
    api.expect(page.locator("#run-title")).to_have_text("Be uploaded.")
    runs = [one["run_id"] for one in service.get("/runs").json()["runs"] if one["objective"] == "Be uploaded."]
    assert len(runs) == 3
    events = [event for run_id in runs for event in service.get(f"/runs/{run_id}/ledger").json()["events"]]
    assert {event["event_type"] for event in events} == {
        "RUN_BOOTED", "WS_UPDATE_APPLIED", "MEMORY_PROPOSED", "MEMORY_COMMITTED", "EPISODE_CREATED",
        "RESUME_PACK_CREATED", "RESUME_PACK_LOADED",
    }  # fmt: skip
    assert {event["actor"] for event in events} == {"web"}

    refusals += [422]
    (tmp_path / "note.zip").write_text("A note.")
    form.get_by_label("Zipped pack").set_input_files(tmp_path / "note.zip")
    form.get_by_role("button", name="Upload", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("it is no zip")


@pytest.mark.parametrize("width", [360, 1280])
def test_a_long_word_makes_no_page_wider_than_its_window(page: Any, service: Service, width: int) -> None:
    run_id = service.boot("objective" * 40, acceptance_criteria=["criterion" * 40])
    item = {"id": "c" * 100, "content": "content" * 40, "timestamp": "2026-01-18T00:00:00Z", "priority": 1}
    service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(sliding_context=[item])})
    batch = service.post(
        f"/runs/{run_id}/memory/propose", {"mcrs": [FACT | {"content": "memory" * 40 + str(width)}]}
    ).json()
    service.post(f"/runs/{run_id}/milestone", {"reason": "reason" * 40, "memory_batch_id": batch["batch_id"]})
    page.set_viewport_size({"width": width, "height": 800})
    page.reload()
    choose(page, run_id)
    status(page, "is open")
    page.get_by_role("button", name="Search", exact=True).click()
    status(page, "found.")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_long_texts_and_errors_leave_room_for_the_rest_of_the_page(
    page: Any, service: Service, refusals: list[int]
) -> None:
    refusals += [422]
    run_id = service.boot("A long objective. " * 500)
    page.set_viewport_size({"width": 360, "height": 800})
    page.reload()
    choose(page, run_id)
    status(page, "is open")
    page.get_by_text("Or write the patch as JSON").click()
    wrong = {f"colour_{number}": "red" for number in range(60)}
    field = page.get_by_label("Patch, in place of all above")
    field.fill(json.dumps({"_schema_version": "2.1", "expected_seq": 0, "set": {"status": 1, **wrong}, **wrong}))
    page.get_by_role("button", name="Apply", exact=True).click()
    api.expect(page.locator("#fault")).to_be_visible()
    for place, most in (("#runs-box", 400), ("#run-title", 170), ("#fault", 330)):
        assert page.locator(place).bounding_box()["height"] <= most, place
    assert page.locator(f"[data-run='{run_id}']").bounding_box()["height"] <= 160


CONTRAST = """
() => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((one) => Number(one) / 255);
    const [r, g, b] = parts.map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ratio = (one, other) => Math.max(light(one) / light(other), light(other) / light(one));
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const panel = style("#boot").backgroundColor, ground = style("body").backgroundColor;
  const button = style("#boot button"), field = style("#boot-objective");
  return {
    text: ratio(style("#boot").color, panel), quiet: ratio(style("#service").color, ground),
    button: ratio(button.color, button.backgroundColor), edge: ratio(field.borderTopColor, panel),
    inner: ratio(field.borderTopColor, field.backgroundColor),
  };
}
"""
"""Of colours that are side by side, as WCAG 2.2 has it (1.4.3, 1.4.11)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_the_edges_of_fields_stand_out_from_their_ground(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert min(found[name] for name in ("text", "quiet", "button")) >= 4.5, found
    assert min(found[name] for name in ("edge", "inner")) >= 3, found


def test_a_service_that_has_ended_is_told(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    with serving(tmp_path_factory.mktemp("ended") / "runs") as service:
        page.goto(service.url)
        api.expect(page.locator("#no-runs")).to_be_visible()
    page.get_by_label("Objective").fill("Too late.")
    page.get_by_role("button", name="Boot", exact=True).click()
    api.expect(page.locator("#fault")).to_contain_text("does not answer")
    api.expect(page.get_by_label("Objective")).to_have_value("Too late.")
    context.close()


def test_a_hundred_runs_are_listed_and_more_where_more_are_asked_for(browser: Any, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", memory=InMemoryMemoryStore())
    booted = [runs.boot(f"Reach {number}.", run_id=f"run_{number}")["run_id"] for number in range(230)][::-1]
    with serving(tmp_path / "runs") as service, page_of(browser, service, []) as page:
        listed, more = page.locator("#runs button"), page.get_by_role("button", name="More runs")
        api.expect(listed).to_have_count(100)
        more.focus()
        page.keyboard.press("Enter")
        status(page, "200 runs are listed.")
        api.expect(listed.nth(100)).to_be_focused()
        service.post(f"/runs/{booted[220]}/step/update", {"patch": a_patch()})
        listed.nth(150).click()
        status(page, f"Run {booted[150]} is open.")
        api.expect(listed).to_have_count(200)
        api.expect(listed.first).to_have_attribute("data-run", booted[220])
        more.click()
        status(page, "230 runs are listed.")
        api.expect(more).to_be_hidden()
        moved = [booted[220], *(one for one in booted if one != booted[220])]
        assert listed.evaluate_all("all => all.map((one) => one.dataset.run)") == moved
