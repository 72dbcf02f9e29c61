"""A run taken to Cloud TPUs: VMs by queued resources, or a JobSet on GKE."""
