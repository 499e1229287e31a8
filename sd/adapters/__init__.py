"""What people add to a model. Each kind has one file, which reads like its paper; README.md says what loads."""
