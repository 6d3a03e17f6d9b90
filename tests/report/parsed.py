"""A report page taken apart: tags, attributes, text and tables."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Parsed(HTMLParser):
    """The page's tags, attributes, text and tables of `[attributes, text]`; an unbalanced tag is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.tables = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append([dict(attrs), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1][1] += data

    def rows(self):
        """The text of every row of every table."""
        return [[text for _, text in row] for table in self.tables for row in table]

    def records(self):
        """The first table as a dict a row."""
        names, *body = ([text for _, text in row] for row in self.tables[0])
        return [dict(zip(names, row, strict=True)) for row in body]
