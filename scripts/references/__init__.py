"""Pages of the site that follow from the sources: each module makes one, as Markdown."""
