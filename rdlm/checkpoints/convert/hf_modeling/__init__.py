"""What `rdlm export hf` copies into an exported folder; nothing here is imported by rdlm."""
