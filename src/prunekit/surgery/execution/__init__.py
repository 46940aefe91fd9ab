"""Running a network while watching it: without memory on the meta device, or with its weights and draws followed."""
