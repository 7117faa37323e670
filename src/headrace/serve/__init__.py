"""The HTTP door: OpenAI's API over one AsyncLLM per model, or AsyncEncoder.

socket ─▶ protocol (limits) ─▶ gate (id, key, log) ─▶ routes ─▶ bodies (validate) ─▶ Job
                                                                                      │ admit, submit
socket ◀─ stream / reply ◀─ replies (bytes) ◀─ parser (tools) ◀── Exchange ◀── Delta ◀┘
"""
