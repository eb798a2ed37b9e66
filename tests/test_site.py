"""``make docs`` builds the site without a warning, and its pages hold what they promise and fetch nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
import fastkd.losses
import fastkd.trainer

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = ["make", "--no-print-directory", "docs", f"PY={sys.executable}", f"SITE={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_no_page_fetches_anything_from_a_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]*\shref=\"?([^\s\">]+)", text)
        assert [address for address in fetched if "//" in address] == [], page
    assert [style for style in site.rglob("*.css") if re.search(r"url\(['\"]?https?:|@import", style.read_text())] == []


def test_the_api_has_every_public_name_and_no_markup_of_another_program(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    names = [f"fastkd.{name}" for name in fastkd.__all__]
    names += [f"fastkd.losses.{name}" for name in fastkd.losses.__all__ if name not in fastkd.__all__]
    main_names = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api" / "trainer.md").read_text(), re.MULTILINE)
    assert {name.removeprefix("fastkd.trainer.") for name in main_names} <= set(fastkd.trainer.__all__)
    assert [name for name in (*names, *main_names) if f'id="{name}"' not in pages] == []
    assert "<blockquote>" not in pages  # what a prompt becomes that is not taken for code, and a line with >=
    assert re.findall(r".{20}(?::\w+:<code>|\.\. code-block).{20}", pages) == []


def test_formulas_are_mathml_and_the_notebook_shows_its_output(site: Path) -> None:
    methods = (site / "methods.html").read_text()
    text = re.sub(r"<pre>.*?</pre>|<code>.*?</code>|<script.*?</script>", "", methods, flags=re.DOTALL)
    assert methods.count('display="block"') == (ROOT / "docs" / "methods.md").read_text().count("```math")
    assert "$" not in text
    assert "\\frac" not in text
    assert "distilled" in (site / "first_steps.html").read_text()
