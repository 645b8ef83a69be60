"""Where a run says what it does: lines, a history, figures beside a bar."""
