"""Models as boxes: what a rank holds, what it receives, and where both lie."""
