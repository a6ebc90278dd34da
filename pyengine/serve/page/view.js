// What is seen of one session: canvas, timeline, prompts, figures.

import { Session } from "./session.js";

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const amount = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

export class View {
  constructor(model, token, prompt) {
    this.model = model;
    this.token = token;
    this.root = document.querySelector("#view").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.root.querySelector(`.${name}`);
    this.canvas = this.root.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    [this.canvas.width, this.canvas.height] = model.size.split("x").map(Number);
    this.canvas.style.aspectRatio = `${this.canvas.width} / ${this.canvas.height}`;
    if (this.canvas.width > 256) this.canvas.style.imageRendering = "auto";
    this.part("prompt").value = prompt;
    this.part("words").append(...(model.prompt_words ?? []).map((word) => this.wordButton(word)));
    this.listen();
    this.begin();
  }

  wordButton(word) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: word });
    button.onclick = () => {
      const box = this.part("prompt");
      box.value = `${box.value.trim()} ${word}`.trim();
      box.focus();
    };
    return button;
  }

  listen() {
    this.part("ask").onsubmit = (event) => {
      event.preventDefault();
      this.ask(this.part("prompt").value.trim());
    };
    this.part("toggle").onclick = () => this.toggle();
    this.canvas.onkeydown = (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1 };
      if (event.key === " ") this.toggle();
      else if (event.key in steps) this.seek(this.shown + steps[event.key] * this.model.fps);
      else return;
      event.preventDefault();
    };
    this.part("time").oninput = () => (this.dragging = true);
    this.part("time").onchange = (event) => {
      this.dragging = false;
      this.seek(Number(event.target.value));
    };
    this.part("branch").onclick = () => {
      this.session.say("session.seek", { frame: this.shown, mode: "branch" });
      this.end = this.shown;
      this.part("past").hidden = true;
    };
    this.part("new").onclick = () => this.begin();
    this.part("save").onclick = () => this.session.say("session.snapshot");
    this.part("load").onchange = (event) => this.load(event.target);
    this.part("format").onchange = () => this.reopen();
  }

  options() {
    return { format: this.part("format").value, stats_interval_s: 1, lead_frames: Math.max(8, Math.ceil(1.5 * this.model.frames_per_chunk)) };
  }

  // A new session in place of the one before.
  begin() {
    this.open();
    const seed = Math.max(0, Math.trunc(Number(this.part("seed").value) || 0));
    this.session.start({ prompt: this.part("prompt").value.trim(), seed, ...this.options() });
  }

  open() {
    this.session?.close();
    const session = new Session(this.token);
    this.session = session;
    Object.assign(this, { shown: 0, end: 0, started: null, paused: false, events: new Map(), drawn: 0 });
    this.part("events").replaceChildren();
    this.part("marks").replaceChildren();
    this.part("past").hidden = true;
    this.state("starting");
    const on = (type, act) => session.addEventListener(type, ({ detail }) => session === this.session && act(detail));
    on("video.start", (news) => {
      this.end = Math.max(this.end, news.frame ?? 0);
      this.state("");
    });
    on("epoch", ({ frame }) => Object.assign(this, { started: null, shown: frame }));
    on("closed", ({ code }) => this.state(code === 4409 ? "resumed elsewhere" : code === 4401 ? "wrong token" : code === 1000 ? "" : "reconnecting"));
    on("error", (news) => this.refused(news));
    on("problem", (news) => this.refused(news));
    on("session.state", (news) => {
      this.paused = news.state === "paused" || news.state === "parked";
      this.part("toggle").textContent = this.paused ? "Play" : "Pause";
      this.state(news.state === "playing" ? "" : news.state);
    });
    on("session.interaction.applied", (news) => this.mark(news));
    on("session.interaction.completed", (news) => this.event(news.event_id, "complete"));
    on("session.stats", (news) => this.figures(news));
    on("snapshot", (message) => this.save(message.payload));
  }

  // The same session in another format.
  reopen() {
    const { id, resumeToken } = this.session;
    if (!id) return this.begin();
    const frame = this.shown;
    this.session.over = true;
    const old = this.session.socket;
    this.session.socket = null;
    old?.close();
    this.session = null;
    this.open();
    this.session.resume(id, resumeToken, frame, this.options());
  }

  ask(prompt) {
    if (!prompt) return;
    const id = crypto.randomUUID?.() ?? String(Math.random());
    this.event(id, "sent", prompt);
    this.session.say("session.interaction", { interaction: { event_id: id, event: { prompt } } });
  }

  event(id, state, prompt) {
    const known = this.events.get(id) ?? { prompt };
    this.events.set(id, { ...known, state });
    const rows = [...this.events.values()].slice(-3).map((one) => {
      const row = document.createElement("li");
      row.append(Object.assign(document.createElement("span"), { textContent: one.prompt }));
      row.append(Object.assign(document.createElement("em"), { textContent: one.state }));
      return row;
    });
    this.part("events").replaceChildren(...rows);
  }

  mark({ event_id, frame, prompt }) {
    this.event(event_id, `from ${clock(frame / this.model.fps)}`, prompt);
    const mark = document.createElement("i");
    mark.dataset.frame = frame;
    mark.title = prompt;
    this.part("marks").append(mark);
  }

  refused({ message, event_id, retry_after }) {
    const waiting = [...this.events].filter(([, one]) => one.state === "sent").map(([id]) => id);
    const id = event_id ?? waiting.at(-1);
    if (id) this.event(id, message);
    else this.state(retry_after ? "waiting for room" : message);
  }

  toggle() {
    this.session.say(this.paused ? "session.play" : "session.pause");
  }

  seek(frame) {
    const to = Math.round(Math.max(0, Math.min(frame, this.end)));
    this.session.say("session.seek", { frame: to });
  }

  save(bytes) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes]));
    link.download = `session-${this.shown}.npz`;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  async load(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    const headers = this.token ? { authorization: `Bearer ${this.token}` } : {};
    const answer = await fetch("/v1/sessions", { method: "POST", body: file, headers });
    const body = await answer.json();
    if (!answer.ok) return this.state(body.error.message);
    this.open();
    this.session.resume(body.id, body.resume_token, body.frame, this.options());
  }

  // Draws the frame whose time has come; called for every refresh of the screen.
  draw(now) {
    const { session, model } = this;
    if (!session?.frames.size) return;
    const first = session.frames.keys().next().value;
    if (this.started === null) this.started = now - (first / model.fps) * 1000;
    let due = Math.floor(((now - this.started) / 1000) * model.fps);
    if (due > first || first > due + 2 * model.fps) {
      this.started = now - (first / model.fps) * 1000; // frames came late, or it stood: the clock goes on from here
      due = first;
    }
    const before = this.shown;
    for (const [number, { image, replayed }] of session.frames) {
      if (number > due) break;
      this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
      image.close();
      session.frames.delete(number);
      this.shown = number;
      this.drawn += 1;
      this.part("past").hidden = !replayed;
    }
    // Paces the server by what is seen, so that a page in the background costs nothing.
    const every = Math.max(1, Math.round(model.fps / 6));
    if (this.shown !== before && this.shown % every === 0) session.say("session.ack", { frame: this.shown });
    this.end = Math.max(this.end, this.shown);
    const time = this.part("time");
    time.max = this.end;
    if (!this.dragging) time.value = this.shown;
    this.part("clock").textContent = `${clock(this.shown / model.fps)} / ${clock(this.end / model.fps)}`;
    for (const mark of this.part("marks").children) mark.style.left = `${(100 * mark.dataset.frame) / Math.max(1, this.end)}%`;
  }

  state(text) {
    this.part("state").textContent = text;
  }

  figures(stats) {
    const unit = (value, suffix) => (value === null || value === undefined ? "–" : `${value} ${suffix}`);
    const rows = {
      "frames/s": stats.fps ?? "–",
      "interval p95": unit(stats.interval_ms.p95, "ms"),
      "prompt to call": unit(stats.prompt_ms, "ms"),
      "network call": unit(stats.call_ms, "ms"),
      batch: stats.batch,
      lead: unit(stats.lead_frames, "frames"),
      received: amount(this.session.bytes),
    };
    const cells = Object.entries(rows).map(([name, value]) => {
      const cell = document.createElement("div");
      cell.append(Object.assign(document.createElement("dt"), { textContent: name }));
      cell.append(Object.assign(document.createElement("dd"), { textContent: value }));
      return cell;
    });
    this.part("figures").replaceChildren(...cells);
  }

  close() {
    this.session.close();
    this.root.remove();
  }
}
