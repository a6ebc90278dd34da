// One session over the live socket: starts, and comes back by itself to the next frame when the connection breaks.

import { KIND, picture, read } from "./wire.js";

const AGAIN = [250, 500, 1000, 2000, 4000]; // milliseconds between attempts

export class Session extends EventTarget {
  constructor(token) {
    super();
    this.token = token;
    this.frames = new Map(); // number -> picture, until it is drawn
    this.epoch = 0;
    this.next = 0; // the first frame that has not come
    this.bytes = 0;
    this.attempt = 0;
  }

  start(options) {
    this.open({ type: "session.start", ...options });
    this.options = options;
  }

  resume(id, token, frame, options) {
    this.id = id;
    this.resumeToken = token;
    this.next = frame;
    this.options = options;
    this.open(this.comeback());
  }

  comeback() {
    const { format, stats_interval_s } = this.options;
    return { type: "session.resume", session_id: this.id, resume_token: this.resumeToken, from_frame: this.next, format, stats_interval_s };
  }

  open(first) {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime/video`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    let order = Promise.resolve(); // pictures are decoded one after the other
    socket.onopen = () => socket.send(JSON.stringify(this.token ? { ...first, token: this.token } : first));
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data === "string") this.hear(JSON.parse(data));
      else order = order.then(() => this.take(read(data))).catch((error) => this.tell("problem", { message: error.message }));
    };
    socket.onclose = ({ code }) => {
      if (socket !== this.socket) return;
      this.tell("closed", { code });
      const waits = this.patient || ![1000, 1008, 1011, 4401, 4409].includes(code);
      this.patient = false;
      if (!waits || this.over) return;
      const pause = AGAIN[Math.min(this.attempt++, AGAIN.length - 1)];
      this.timer = setTimeout(() => this.open(this.id ? this.comeback() : first), pause);
    };
  }

  hear(news) {
    if (news.type === "video.start") {
      this.id = news.session_id;
      this.resumeToken = news.resume_token;
      this.fps = news.fps;
      this.enter(news.epoch, news.frame ?? this.next, true);
      this.attempt = 0;
    } else if (news.type === "error" && news.retry_after) {
      this.patient = true;
    }
    this.tell(news.type, news);
  }

  async take(message) {
    this.bytes += message.payload.length;
    if (message.kind === KIND.snapshot) return this.tell("snapshot", message);
    if (message.epoch < this.epoch) return;
    if (message.epoch > this.epoch) this.enter(message.epoch, message.frame);
    const image = await picture(message);
    if (message.epoch !== this.epoch) return image.close();
    this.frames.set(message.frame, { image, replayed: (message.flags & 4) !== 0 });
    this.next = Math.max(this.next, message.frame + 1);
  }

  // Frames of another epoch are void; only where a session is resumed, those before the frame that it goes on from are still to be drawn.
  enter(epoch, frame, resumed = false) {
    for (const [number, { image }] of this.frames) {
      if (resumed && number < frame) continue;
      image.close();
      this.frames.delete(number);
    }
    this.epoch = epoch;
    this.next = frame;
    if (!this.frames.size) this.tell("epoch", { epoch, frame });
  }

  say(type, data = {}) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...data }));
  }

  close() {
    this.over = true;
    clearTimeout(this.timer);
    this.say("session.stop");
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    for (const { image } of this.frames.values()) image.close();
    this.frames.clear();
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
