"""An archive of studies that can be asked: what is kept of each, the stores that keep it, filters, search, and readings by neighbours."""
