"""The page that people judge on, in the browser. It holds no model: what it shows and what it is told is in the store."""
