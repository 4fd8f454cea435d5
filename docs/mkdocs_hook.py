"""A hook of mkdocs (mkdocs.yml): makes the repository's links work on the site.

The documents link to each other and to source files by relative paths, as GitHub shows them. The site holds docs/ alone, so here

    README.md                       becomes the site's first page,
    README.md of another folder     becomes a page at the same path (kernels/README.md),
    a source file that is linked    becomes a page that shows it, below source/,
    a folder that is linked         is its README.md or its __init__.py,
    a picture that is linked        is copied.

A link to something that is not there stays as it is, and mkdocs --strict ends with an error that names it.
"""
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")      # [text](path#anchor), not an address with a scheme
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
PAGES = ("README.md", "kernels/README.md", "csrc/README.md", "benchmarks/README.md")     # Markdown outside of docs/
PICTURES = (".svg", ".png")


def on_files(files, config):
    for path in PAGES:
        files.append(File.generated(config, page_of(path), content=(ROOT / path).read_text(encoding="utf-8")))
    markdown = {**{path: ROOT / path for path in PAGES}, **{f"docs/{path.name}": path for path in Path(config.docs_dir).glob("*.md")}}
    for path, file in markdown.items():
        for target in linked(path, file.read_text(encoding="utf-8")):
            page = page_of(target)
            if page is None or files.get_file_from_path(page) is not None:
                continue
            if target.endswith(PICTURES):
                files.append(File.generated(config, page, abs_src_path=str(ROOT / target)))
            else:
                files.append(File.generated(config, page, content=shown(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    path = next((path for path in PAGES if page_of(path) == page.file.src_uri), f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("source/"):
        return markdown

    def moved(match):
        target = page_of(resolved(path, match[2]))
        if target is None:
            return match[0]         # mkdocs says that it is not there
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{match[3] or ''}{match[4]}"
    return outside_code(markdown, lambda text: LINK.sub(moved, text))


def resolved(path, link):
    """The file of the repository that a link in the file `path` leads to; of a folder its README.md or __init__.py."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if (ROOT / target).is_dir():
        return next((f"{target}/{name}" for name in ("README.md", "__init__.py") if (ROOT / target / name).is_file()), target)
    return target


def page_of(path):
    """Where the site has a file of the repository; None where there is no such file."""
    if path == "README.md":
        return "index.md"
    if not (ROOT / path).is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", *PICTURES)) else f"source/{path}.md"


def linked(path, text):
    """The files of the repository that the Markdown `text` of the file `path` links to."""
    found = []
    outside_code(text, lambda part: found.extend(resolved(path, match[2]) for match in LINK.finditer(part)) or part)
    return [target for target in dict.fromkeys(found) if (ROOT / target).is_file()]


def outside_code(text, change):
    """text, with `change` made to what is not in a fenced block."""
    parts, end = [], 0
    for match in FENCED.finditer(text):
        parts += [change(text[end:match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def shown(path):
    """A page that shows a source file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = {".py": "python", ".cpp": "cpp", ".cu": "cuda", ".h": "cpp"}.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language} linenums=\"1\"\n{text.rstrip()}\n````\n"
