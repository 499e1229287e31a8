"""The playground: a page on which one sees the model think, and the interface of AUTOMATIC1111's web UI. See README.md."""
