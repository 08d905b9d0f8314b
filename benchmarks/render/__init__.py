"""What people see of a result: tables, Markdown, the page and its plots."""
