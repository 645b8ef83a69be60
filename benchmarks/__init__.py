"""What the project measures, one folder to a subject; see README.md beside this file.

A script is run from the root of the repository as a module:
`python -m benchmarks.finetune.short_runs --data FOLDER`.
"""
