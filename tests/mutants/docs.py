"""What people read, and what the build says of itself."""

from mutants.entry import Mutant

MUTANTS = [
    Mutant(
        "a version in a second place",
        "pyproject.toml",
        'dynamic = ["version"]',
        'version = "0.0.9"',
        "test_build.py::test_one_place_names_the_version",
    ),
    Mutant(
        "a page that the navigation forgets",
        "docs/conf.py",
        '"docs/quick-start", ',
        "",
        "test_docs.py::test_the_navigation_contains_every_page",
    ),
    Mutant(
        "a public function without its documentation",
        "docs/api.md",
        ".. autofunction:: front_loaded\n",
        "",
        "test_docs.py::test_every_public_name_is_on_the_api_page",
    ),
    Mutant(
        "a link to a heading that is gone",
        "docs/api.md",
        "# API\n",
        "# API\n\n[gone](serving.md#no-such-heading)\n",
        "test_docs.py::test_links_lead_somewhere",
    ),
    Mutant(
        "an error text that the package no longer has",
        "docs/troubleshooting.md",
        "`SDTP needs left padding`",
        "`SDTP wants left padding`",
        "test_docs.py::test_troubleshooting_has_the_texts_that_the_package_prints",
    ),
    Mutant(
        "a quick start with a line that fails",
        "docs/quick-start.md",
        'with apply_sdtp(model, "question", 0.9) as handle:',
        'with apply_sdtp(model, "saliency", 0.9) as handle:',
        "test_docs.py::test_the_lines_of_the_first_pages_run",
    ),
]
