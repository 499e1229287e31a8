"""The playground: a page on which one sees the model think, and AUTOMATIC1111's interface for programs. See README.md."""
