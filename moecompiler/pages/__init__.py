"""HTML pages that ask nothing of anybody: what all of them share."""
