"""From a folder of clips and captions to what training reads: samples, findings, frames."""
