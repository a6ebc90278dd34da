// The page: one view or two, and whether the server is there.

import { View } from "./view.js";

const find = (name) => document.querySelector(name);
const PROMPT = "a red circle bounces over a blue background";
const OTHER = "a green star orbits over a grey background";
const views = [];
let model, token;

async function models() {
  token = sessionStorage.getItem("token") ?? "";
  const answer = await fetch("/v1/models", { headers: token ? { authorization: `Bearer ${token}` } : {} });
  if (answer.status === 401) {
    find("#login").hidden = false;
    find("#token").focus();
    return null;
  }
  return (await answer.json()).data[0];
}

async function ready() {
  const answer = await fetch("/ready");
  const { stage, done, total } = await answer.json();
  find("#server").textContent = answer.ok ? "ready" : `${stage} ${done}/${total}`;
  return answer.ok;
}

async function begin() {
  try {
    while (!(await ready())) await new Promise((later) => setTimeout(later, 300));
    model = await models();
  } catch {
    find("#server").textContent = "no answer";
    setTimeout(begin, 1000);
    return;
  }
  if (!model) return;
  find("#login").hidden = true;
  find("#model").textContent = model.id;
  add(known(PROMPT));
  window.requestAnimationFrame(draw);
  setInterval(() => ready().catch(() => (find("#server").textContent = "no answer")), 5000);
}

// A prompt for a start that this model knows: ours, or its first words.
function known(prompt) {
  const words = model.prompt_words;
  if (!words) return "";
  return prompt.split(" ").every((word) => words.includes(word)) ? prompt : words.slice(0, 3).join(" ");
}

function add(prompt) {
  const view = new View(model, token, prompt);
  views.push(view);
  find("#views").append(view.root);
  find("#views").classList.toggle("two", views.length > 1);
}

function draw(now) {
  for (const view of views) view.draw(now);
  window.requestAnimationFrame(draw);
}

find("#second").onclick = ({ currentTarget }) => {
  if (!model) return;
  if (views.length > 1) views.pop().close();
  else add(known(OTHER));
  currentTarget.setAttribute("aria-pressed", String(views.length > 1));
  find("#views").classList.toggle("two", views.length > 1);
};
find("#login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", find("#token").value);
  begin();
};
window.addEventListener("pagehide", () => views.forEach((view) => view.session.socket?.close()));
window.pyengine = { views }; // for looking at it from outside
begin();
