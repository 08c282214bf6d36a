"""Speech made by espeak-ng: words, speakers, recordings, noise; the `corpus` step when no data are brought along."""
