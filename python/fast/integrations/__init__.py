"""The method inside the trainers of other libraries; each module imports its own library."""
