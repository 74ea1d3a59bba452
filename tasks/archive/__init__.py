"""An archive of studies and reports: kept, searched, and read from."""
