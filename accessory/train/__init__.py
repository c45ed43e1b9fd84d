"""The one training loop, its objectives, optimizer, schedules and state."""
