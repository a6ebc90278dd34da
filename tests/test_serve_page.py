"""The page in a real browser: every frame drawn in order, prompts, pause, seek, and a server that is restarted behind it."""

from __future__ import annotations

import time
from pathlib import Path

import browser
import pytest
from fake_batch import FakeEngine
from serving import served

PAGE = Path(__file__).parents[1] / "pyengine" / "serve" / "page"


def test_the_page_asks_no_other_server_and_runs_no_inline_script() -> None:
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    html = (PAGE / "index.html").read_text()
    assert html.count("<script") == html.count('<script type="module" src="/static/') == 1
    assert "style=" not in html
    assert "onclick=" not in html


@pytest.mark.skipif(
    browser.found() is None, reason="needs Chromium (apt-get install chromium-headless-shell)"
)
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    engine = {"seconds": 0.001, "size": 32, "fps": 30.0}
    page = browser.Browser(tmp_path / "profile")
    try:
        with served(tmp_path, FakeEngine(**engine), interval=60) as server:
            page.open(server.url)
            page.until("pyengine.views[0].shown", lambda shown: shown is not None and shown >= 90)
            drawn, shown = page.run("[pyengine.views[0].drawn, pyengine.views[0].shown]")
            assert drawn == shown + 1  # none left out
            page.run("document.querySelector('.prompt').value = 'a blue square'")
            page.run("document.querySelector('.prompt').focus()")
            page.key("Enter")
            page.until("document.querySelector('.events em').textContent == 'complete'")
            assert page.run("document.querySelectorAll('.marks i').length") == 1
            page.run("document.querySelector('canvas').focus()")
            page.key(" ")
            page.until("document.querySelector('.toggle').textContent == 'Play'")
            (session,) = server.service.scheduler.sessions.values()
            stood = session.frame - 1  # what is on its way still comes
            page.until(f"pyengine.views[0].shown == {stood}")
            time.sleep(0.3)
            assert session.frame == stood + 1
            assert page.run("pyengine.views[0].shown") == stood
            page.key(" ")
            page.until(f"pyengine.views[0].shown > {stood} + 8")
            page.run("pyengine.views[0].seek(12)")
            page.until("!document.querySelector('.past').hidden && pyengine.views[0].shown < 60")
            page.run("document.querySelector('.branch').click()")
            page.until("document.querySelector('.past').hidden && pyengine.views[0].session.epoch == 3")
            page.run("document.querySelector('#second').click()")
            page.until("pyengine.views[1].shown", lambda shown: shown is not None and shown > 16)
            page.run("document.querySelector('#second').click()")
            page.until("document.querySelectorAll('.figures dd').length == 7")
            port = server.port
        page.until("document.querySelector('.state').textContent == 'reconnecting'")
        before = page.run("[pyengine.views[0].shown, pyengine.views[0].drawn]")
        with served(tmp_path, FakeEngine(**engine), port=port):
            page.until(f"pyengine.views[0].shown > {before[0]} + 24")
            after = page.run("[pyengine.views[0].shown, pyengine.views[0].drawn]")
            assert after[0] - before[0] == after[1] - before[1]  # none lost, none repeated
        assert page.problems == []
        assert all(f"://127.0.0.1:{port}/" in url or url.startswith("blob:") for url in page.requests), (
            page.requests
        )
    finally:
        page.close()
