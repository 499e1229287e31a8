"""The playground: a page on which one sees the model think, and AUTOMATIC1111's interface. See README.md."""
