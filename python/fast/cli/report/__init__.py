"""What commands show: tables, figures, HTML."""
