"""What the course's notebooks import: models, measuring, memory, chat, records. What a notebook teaches stands in the notebook.

Importing this package changes nothing in the process: `bootstrap.start`, which a notebook's first cell calls, says what it sets.
"""

__version__ = "0.1.0"
