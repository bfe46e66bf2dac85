"""What passes did, as one HTML page: times, counts, numbers, and every kind of rewrite as a picture before and after it."""
