"""What `lab bench`, `compare`, `sweep`, `gate`, `merge` and `report` do."""
