"""The picture of the report in the README: `python docs/pictures/report.py [out/verify/report.html]` after `make demo`.

Opens the page in the Chromium that is installed, with its first subject unfolded and the rest hidden, and writes
docs/pictures/report.png.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "out" / "verify" / "report.html"
STYLE = """<style>
  :root { color-scheme: light } body { max-width: 62rem; padding: 1rem 1.5rem 1.5rem }
  main > section:not([aria-labelledby="subjects"]), details ~ details, section > h2, section > p, footer { display: none }
  .attack ~ .attack, details > ul, details > .strip ~ .strip { display: none }
  .attack { display: grid; grid-template-columns: 1fr 1fr } .attack > h4, .attack > ul { grid-column: 1 / -1 }
</style>"""


def main() -> None:
    """Write the picture."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("there is no Chromium on this machine: install it first")
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    before, mark, after = page.read_text(encoding="utf-8").partition('aria-labelledby="subjects"')
    text = (before + mark + after.replace("<details", "<details open", 1)).replace("</head>", f"{STYLE}</head>")
    with tempfile.TemporaryDirectory() as scratch:
        copy, shot = Path(scratch) / "page.html", Path(scratch) / "shot.png"
        copy.write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,2000"]
        subprocess.run([browser, *flags, f"--screenshot={shot}", copy.as_uri()], check=True, capture_output=True)
        with Image.open(shot) as opened:
            picture = opened.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    box = ImageChops.difference(picture, white).getbbox() or (0, 0, *picture.size)
    picture = picture.crop((0, 0, picture.width, min(picture.height, box[3] + 24)))
    picture.quantize(256).save(HERE / "report.png", optimize=True)


if __name__ == "__main__":
    main()
