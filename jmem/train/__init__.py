"""Loss and training loop; both know no method (see `jmem.finetune`)."""
