/** aligngpt/report: pages of one HTML file that holds all it shows, without scripts, and line charts for them. */
export { CHART_STYLE, type Line, lineChart } from '../report/charts.js'
export { escapeHtml, htmlPage, PAGE_STYLE } from '../report/html.js'
