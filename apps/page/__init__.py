"""The page on which people judge, in the browser. It holds no model: everything that it shows or records is in the store."""
