"""The service layer: live sessions, jobs and a web page over `engine.batch`. Needs the extra `serve`; nothing below imports it.

scheduler.py session.py timeline.py store.py    sessions on one device, without HTTP
pacing.py admission.py                          when a stream may go on, and whether one more fits
live.py jobs.py videos.py app.py                what HTTP and WebSocket make of them
safety.py limits.py metrics.py                  who may, how much, and how it goes
"""
