"""What joins the client to frameworks. Each module needs an extra of its own."""
