"""An archive of studies that can be asked: what is stored of each, and which of them a question is about."""
